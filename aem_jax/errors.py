"""The error that every command reports as one line on stderr, with exit status 2."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: what was expected, what came, and how to fix it."""
