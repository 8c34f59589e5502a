"""External and user-written environments that speak OpenEnv's messages."""
