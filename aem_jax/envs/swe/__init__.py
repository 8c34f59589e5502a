"""Software-engineering tasks in SWE-bench's schema: sandboxes for untrusted code, tools, tasks and grading."""
