"""Bug-fixing tasks from small bundled packages: an edit breaks named tests, and its reverse is the fix."""
