"""Settings and statistics of a pool of environment sessions."""

from dataclasses import dataclass, field

from aem_jax.envs.serving.address import keeps_secrets, without_password
from aem_jax.envs.serving.field_mapping import FieldMapping


@dataclass(frozen=True)
class PoolConfig:
    """Where the environments run, and their deadlines."""

    urls: tuple[str, ...] = ()
    """Servers to connect to (host:port, ws://…); none: the pool starts its own."""
    command: str = ""
    """Command that starts one server of another package, with {port} in it. The pool starts, watches and restarts
    num_servers of them. Each must serve at 127.0.0.1:{port}, and end when it is killed."""
    num_servers: int = 2
    """Server processes that the pool starts; a failure affects one server."""
    sessions_per_server: int = 32
    """Number of sessions on each server."""
    reset_deadline_s: float = 60.0
    """Maximum duration of a reset, seconds."""
    step_deadline_s: float = 30.0
    """Maximum duration of a step, seconds."""
    start_deadline_s: float = 60.0
    """Maximum duration of the start of a server, seconds."""
    restart_wait_s: float = 60.0
    """Maximum time that a reset waits for the restart of a failed server, seconds."""
    first_pause_s: float = 0.25
    """First pause between attempts to reach a server, seconds; doubles up to 10."""
    send_admissible: bool = False
    """Whether this package's servers send admissible actions with observations."""
    field_mapping: FieldMapping = field(default_factory=FieldMapping)
    """Names of the servers' fields; the default suits this package's servers."""
    token_variable: str = ""
    """Environment variable with a token for the servers of urls, sent as `Authorization: Bearer …`. The token is
    written nowhere. Empty: none."""

    def __post_init__(self) -> None:
        if self.command and (self.urls or "{port}" not in self.command):
            raise ValueError(
                f"expected command with {{port}} in it and no urls beside it, got {self.command!r} and {self.urls}"
            )
        if self.token_variable and not self.urls:
            raise ValueError("expected urls beside token_variable, got none")
        if self.token_variable and (url := next((url for url in self.urls if not keeps_secrets(url)), "")):
            url = without_password(url)
            raise ValueError(f"expected urls of https:// or wss:// beside token_variable, got {url!r}")
        if self.token_variable and (url := next((url for url in self.urls if "@" in url), "")):
            url = without_password(url)
            raise ValueError(f"expected urls without a user beside token_variable, got {url!r}; one of them is sent")
        for name in ("num_servers", "sessions_per_server"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("reset_deadline_s", "step_deadline_s", "start_deadline_s", "restart_wait_s", "first_pause_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0 seconds, got {getattr(self, name)}")


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was opened.

    Attributes:
        calls: resets and steps started.
        failed_calls: calls that raised `EnvError`.
        restarts: restarts of each server that the pool started.
        errors: the latest 100 failures, oldest first.
    """

    calls: int
    failed_calls: int
    restarts: tuple[int, ...]
    errors: tuple[str, ...]
