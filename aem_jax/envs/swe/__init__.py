"""Bug-fixing tasks in SWE-bench's schema: instances, checkouts, grading, and a source of tasks of our own."""
