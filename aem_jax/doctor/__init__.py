"""Whether this machine trains correctly, and how fast."""
