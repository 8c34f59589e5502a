"""What an environment is tested with: conformance checks, replay of recorded episodes, scripted environments."""
