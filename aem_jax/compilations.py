"""Counts compilations: the metrics of every step show whether a program was compiled after warm-up."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _count_event(event: str, duration_secs: float, **_: object) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_count_event)


def compilations() -> int:
    """Number of programs that this process compiled, or loaded from the persistent cache, since the import."""
    return _count
