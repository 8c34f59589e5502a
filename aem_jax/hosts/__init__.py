"""The processes of one run, among themselves. No jax in here: they speak over a line of their own."""

from aem_jax.hosts.group import ALONE, Hosts

__all__ = ["ALONE", "Hosts"]
"""The way in; the line itself is `aem_jax.hosts.line`."""
