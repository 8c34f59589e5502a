"""ALFWorld without TextWorld: an engine that plays a game file by the file's own domain, problem and grammar."""
