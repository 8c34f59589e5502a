"""The rim: command line, run config, presets, serve, bench. Names turn into functions here and nowhere below."""
