"""Other people's environments, and your own, behind OpenEnv's messages."""
