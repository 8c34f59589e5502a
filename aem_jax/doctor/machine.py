"""The machine: packages, devices, memory, disk, sandboxes. Functions that need jax import it themselves."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_jax.doctor.finding import Finding, judge

if TYPE_CHECKING:
    from aem_jax.doctor.config import DoctorConfig

GIB = 2**30

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
NEEDED = (
    *SHOWN,
    *("grain", "scipy", "tokenizers", "safetensors", "huggingface_hub", "tyro", "rich", "tensorboardX", "matplotlib"),
    *("jinja2", "websockets", "rapidfuzz", "regex", "starlette", "uvicorn"),
)
"""Distributions that a run loads; used if aem_jax is not installed and its metadata is not available."""
PLUGIN = re.compile(r"jax[-_](cuda\d+|rocm\d+)[-_](plugin|pjrt)")

INSTALL = "pip install -c constraints.txt . in aem_jax's folder"
LEAST_HOST_MEMORY = 2 * GIB
LEAST_DISK = 2 * GIB
CHECKPOINT_BYTES = 12
"""Bytes per parameter: the master weight and both Adam moments."""


def missing_packages() -> Finding | None:
    """A fault if a package that every check needs is missing; called before any other import."""
    absent = [name for name in NEEDED if not _version(name)]
    return Finding(False, f"not installed: {', '.join(absent)}", INSTALL, name="versions") if absent else None


def versions(config: "DoctorConfig") -> Finding:
    """Versions of the packages that affect a result, and whether they are compatible."""
    import aem_jax

    found = {"aem_jax": aem_jax.__version__, "python": platform.python_version()}
    found |= {name: _version(name) for name in SHOWN}
    card = nvidia()
    if card:
        found |= {"driver": card["driver"]}
    plugins = {
        name: _version(name) for each in importlib.metadata.distributions() if PLUGIN.match(name := each.name or "")
    }
    faults = _unmet()
    for name, version in plugins.items():
        if version != found["jaxlib"]:
            faults.append(f"{name} {version} beside jaxlib {found['jaxlib']}")
    text = ", ".join(f"{name} {version}" for name, version in {**found, **plugins}.items())
    return judge(faults, text, f"{INSTALL}; jax, jaxlib and their plugin are of one version", {**found, **plugins})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet() -> list[str]:
    """Unmet requirements of aem_jax, from its metadata if it is installed."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(each) for each in importlib.metadata.requires("aem_jax") or ()]
    except importlib.metadata.PackageNotFoundError:
        asked = [Requirement(name) for name in NEEDED]
    faults = []
    for each in asked:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        version = _version(each.name)
        if not version or not each.specifier.contains(version, prereleases=True):
            faults.append(f"expected {each.name}{each.specifier}, got {version or 'none'}")
    return faults


def nvidia() -> dict[str, str]:
    """Name, driver, CUDA and total memory in MiB of the first NVIDIA card, from nvidia-smi; empty without a card."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        name, driver, memory = (word.strip() for word in lines[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"name": name, "driver": driver, "memory_mib": memory, "count": str(len(lines))}


def devices(config: "DoctorConfig") -> Finding:
    """The devices that jax uses, and whether better ones are available."""
    import jax

    found = jax.devices()
    kind = found[0].device_kind
    facts: dict[str, Any] = {"count": len(found), "kind": kind, "platform": found[0].platform}
    text = f"{len(found)} x {kind} ({found[0].platform})"
    if capability := getattr(found[0], "compute_capability", None):
        facts["compute_capability"] = str(capability)
        text += f", compute capability {capability}"
    card = nvidia()
    by_choice = config.runtime.platform or os.environ.get("JAX_PLATFORMS")
    if found[0].platform == "cpu" and card and by_choice:
        text += f"; {card['count']} x {card['name']} left alone, since the platform is set to {by_choice}"
    elif found[0].platform == "cpu" and card:
        extra = "cuda13" if _major(card["driver"]) >= 580 else "cuda12"
        fault = f"{card['count']} x {card['name']} is there, but jax computes on the CPU"
        return judge([fault], text, f"pip install 'aem_jax[{extra}]' (driver {card['driver']})", facts)
    elif card and int(card["count"]) > len(found):
        text += (
            f"; nvidia-smi lists {card['count']} (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')})"
        )
    return Finding(True, text, facts=facts)


def _major(version: str) -> int:
    return int(version.split(".")[0]) if version.split(".")[0].isdigit() else 0


def memory(config: "DoctorConfig") -> Finding:
    """Free memory of the host and of the devices."""
    import jax

    total, free = host_memory()
    facts: dict[str, Any] = {"host_total": total, "host_free": free}
    text = f"host {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    faults = [f"the host has {free / GIB:.1f} GiB left"] if free < LEAST_HOST_MEMORY else []
    advice = ["end other processes, or give the container more memory"] if faults else []
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if not limit:
        return judge(faults, f"{text}; devices share it", "; ".join(advice), facts)
    facts["device_limit"] = limit
    text += f"; each device {limit / GIB:.1f} GiB for jax"
    if card := nvidia():
        whole = int(card["memory_mib"]) * 2**20
        facts["device_total"] = whole
        text += f" of {whole / GIB:.1f}"
        if limit < 0.4 * whole:
            faults.append("most of a device's memory is not jax's")
            advice.append(
                "end what holds it (nvidia-smi lists it), or raise XLA_PYTHON_CLIENT_MEM_FRACTION, .75 by default"
            )
    return judge(faults, text, "; ".join(advice), facts)


def host_memory() -> tuple[int, int]:
    """Total bytes, and bytes free for new processes; a container's limit if that is smaller."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, AttributeError):  # reclaimable memory counts as free
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        free = int(found[1]) * 1024 if found else free
    for folder, most, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            limit, taken = (int(Path(folder, name).read_text(encoding="ascii")) for name in (most, used))
            total, free = min(total, limit), min(free, limit - taken)
    return total, max(free, 0)


def disk(config: "DoctorConfig") -> Finding:
    """Whether the folder of runs is writable, and its free disk space."""
    folder = Path(config.runs_dir).expanduser().absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as inside:
            path = Path(inside, "file")
            path.write_bytes(b"aem_jax" * 1000)
            path.rename(path.with_name("renamed"))
            is_same = path.with_name("renamed").read_bytes() == b"aem_jax" * 1000
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(False, f"{folder} cannot be written: {error.strerror or error}", "give another --runs-dir")
    need = max(2 * CHECKPOINT_BYTES * config.shape.num_parameters, LEAST_DISK)
    faults = [] if is_same else ["a file written there reads as another"]
    if free < need:
        faults.append(f"expected room for two checkpoints of {config.model}, {need / GIB:.1f} GiB")
    text = f"{free / GIB:.1f} GiB free in {folder}"
    return judge(faults, text, "make room, or give another --runs-dir", {"free": free, "need": need})


def bubblewrap(config: "DoctorConfig") -> Finding:
    """Whether SWE tasks can run in bubblewrap."""
    from aem_jax.envs.swe.sandbox.bubblewrap import probe

    return _sandbox(probe(), "apt install bubblewrap; it needs user namespaces (docs/swe.md)")


def docker(config: "DoctorConfig") -> Finding:
    """Whether SWE tasks can run in docker containers."""
    return _containers("docker")


def podman(config: "DoctorConfig") -> Finding:
    """Whether SWE tasks can run in podman containers."""
    return _containers("podman")


def _containers(engine: str) -> Finding:
    from aem_jax.envs.swe.sandbox.containers import probe

    return _sandbox(probe(engine), f"start a {engine} that this user may use")


def _sandbox(reason: str, advice: str) -> Finding:
    """A missing sandbox is not a fault: only the SWE environments need one, and one of the three is enough."""
    if not reason:
        return Finding(True, "works")
    return Finding(None, " ".join(reason.split())[:300], f"for SWE tasks alone: {advice}")
