"""ALFWorld without TextWorld: an engine that plays a game file from the domain, problem and grammar inside it."""
