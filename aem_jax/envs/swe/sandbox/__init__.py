"""Workspaces for untrusted code: bubblewrap or containers, and how one of them is chosen."""
