"""Environments: the protocol, servers, the client and pool, and the environments themselves. No JAX in here."""
