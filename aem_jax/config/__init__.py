"""Settings of a run: presets, overrides, validation, and the functions that names stand for."""
