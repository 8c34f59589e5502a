"""Environment servers, and the pool of sessions that a rollout calls. The protocol is OpenEnv's WebSocket messages."""
