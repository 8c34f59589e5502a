"""What a run can be told: settings, presets, overrides, and the functions that names stand for."""
