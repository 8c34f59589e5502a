"""Settings of a run: the composed config, presets, and the functions that names stand for."""
