"""ALFWorld without TextWorld: an engine that plays a game from the domain, problem and grammar in its file."""
