"""Counts compilations, so that "nothing compiles after warm-up" is a number in every step's metrics."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> int:
    """Programs compiled (or fetched from the persistent cache) by this process since this module was imported."""
    return _count
