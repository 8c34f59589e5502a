"""Software-engineering tasks in SWE-bench's schema: sandboxes for untrusted code, the agent's tools, tasks and grading."""
