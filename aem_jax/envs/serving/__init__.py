"""Environment servers and the pool of sessions that a rollout talks to. The wire is OpenEnv's WebSocket messages."""
