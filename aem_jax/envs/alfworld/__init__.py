"""ALFWorld without TextWorld: an engine that plays a game file by reading the file's own domain, problem and grammar."""
