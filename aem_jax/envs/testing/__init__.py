"""Test tools for environments: conformance checks, replay of recorded episodes, scripted environments."""
