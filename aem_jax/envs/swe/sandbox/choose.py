"""Chooses the sandbox runtime for untrusted code; refuses to run without one."""

from collections.abc import Callable, Mapping
from functools import lru_cache

from aem_jax.envs.swe.sandbox import bubblewrap, engine
from aem_jax.envs.swe.sandbox.admission import Admission, HostConfig
from aem_jax.envs.swe.sandbox.bubblewrap import Bubblewrap, BubblewrapConfig
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers
from aem_jax.envs.swe.sandbox.kubernetes import Kubernetes
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig
from aem_jax.envs.swe.sandbox.workspace import Runtime, SandboxError

ADVICE = (
    "Untrusted code is not run without isolation. Install bubblewrap (`apt install bubblewrap`, `dnf install "
    "bubblewrap`), which needs user namespaces (`sysctl kernel.unprivileged_userns_clone=1`, on Ubuntu 24.04 also "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or start as root), or start a docker or podman that this "
    "user may use"
)

_PROBES: Mapping[str, Callable[[BubblewrapConfig], str]] = {
    "bubblewrap": bubblewrap.probe,
    "docker": lambda config: engine.probe("docker"),
    "podman": lambda config: engine.probe("podman"),
}
"""Probes of the runtimes, in the order in which `auto` tries them."""

RUNTIMES = tuple(_PROBES)

# results are cached: they do not change during a process, and a probe starts a sandbox
_why_not = lru_cache(maxsize=64)(lambda name, config: _PROBES[name](config))


def choose_runtime(
    name: str = "auto",
    bubblewrap: BubblewrapConfig | None = None,
    container: ContainerConfig | None = None,
    kubernetes: KubernetesConfig | None = None,
    host: HostConfig | None = None,
) -> Runtime:
    """Returns the named runtime, or with `auto` the first of this machine that works.

    Args:
        name: `auto`, `bubblewrap`, `docker`, `podman` or `kubernetes`.
        bubblewrap: contents of a bubblewrap sandbox.
        container: settings of containers.
        kubernetes: settings of a cluster.
        host: what the workspaces of this host may take together.

    Raises:
        ValueError: unknown name, or an invalid pod template.
        SandboxError: the named runtime, or every runtime, fails on this machine; the message gives the reasons and what
            to install.
    """
    bubblewrap, container = bubblewrap or BubblewrapConfig(), container or ContainerConfig()
    if name == "kubernetes":
        return Kubernetes(kubernetes or KubernetesConfig(), container)
    if name != "auto" and name not in _PROBES:
        raise ValueError(f"expected a runtime of auto, {', '.join(_PROBES)}, kubernetes, got {name!r}")
    reasons = []
    for candidate in _PROBES if name == "auto" else (name,):
        reason = _why_not(candidate, bubblewrap)
        if not reason:
            admission = Admission(host or HostConfig())
            if candidate == "bubblewrap":
                return Bubblewrap(bubblewrap, admission)
            runtime = Containers(candidate, container, admission=admission)
            runtime.remove_orphans()
            return runtime
        reasons.append(f"{candidate}: {reason}")
    raise SandboxError(f"expected a sandbox for untrusted code, found none that works ({'; '.join(reasons)}). {ADVICE}")
