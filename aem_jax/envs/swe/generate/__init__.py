"""Bug-fixing tasks made of small packages of our own: one edit breaks named tests, its reverse is the fix."""
