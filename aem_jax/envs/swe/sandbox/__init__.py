"""Workspaces for untrusted code: bubblewrap, containers, and the choice between them."""
