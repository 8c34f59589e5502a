"""The machine: packages, devices, memory, disk, sandboxes. Functions that need jax import it themselves."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_jax.distributed.runtime import GPU_MEMORY_SHARE
from aem_jax.doctor.finding import Finding, judge

if TYPE_CHECKING:
    from aem_jax.doctor.config import DoctorConfig

MIB, GIB = 2**20, 2**30

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
NEEDED = (
    *SHOWN,
    *("grain", "scipy", "tokenizers", "safetensors", "huggingface_hub", "rich", "tensorboardX", "matplotlib"),
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

    shown = {"aem_jax": aem_jax.__version__, "python": platform.python_version()}
    shown |= {name: _version(name) for name in SHOWN}
    if card := nvidia():
        shown |= {"driver": card["driver"]}
    installed = (distribution.name or "" for distribution in importlib.metadata.distributions())
    plugins = {name: _version(name) for name in installed if PLUGIN.match(name)}
    faults = _unmet()
    for name, version in plugins.items():
        if version != shown["jaxlib"]:
            faults.append(f"{name} {version} beside jaxlib {shown['jaxlib']}")
    shown |= plugins
    text = ", ".join(f"{name} {version}" for name, version in shown.items())
    return judge(faults, text, f"{INSTALL}; jax, jaxlib and their plugin must have one version", shown)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet() -> list[str]:
    """Unmet requirements of aem_jax, from its metadata if it is installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("aem_jax") or ()]
    except importlib.metadata.PackageNotFoundError:
        requirements = [Requirement(name) for name in NEEDED]
    faults = []
    for required in requirements:
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        version = _version(required.name)
        if not version or not required.specifier.contains(version, prereleases=True):
            faults.append(f"expected {required.name}{required.specifier}, got {version or 'none'}")
    return faults


def nvidia() -> dict[str, str]:
    """Facts of the first NVIDIA card, from nvidia-smi; empty without a card.

    They are its name, driver, total memory in MiB, MIG mode ("Enabled" if it is split), and the number of cards. A card
    without a memory of its own, or without MIG, has "[N/A]" there.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    names = ("name", "driver", "memory_mib", "mig")
    fields = "name,driver_version,memory.total,mig.mode.current"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        card = dict(zip(names, map(str.strip, lines[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {**card, "count": str(len(lines))}


def devices(config: "DoctorConfig") -> Finding:
    """The devices that jax uses, and whether better ones are available."""
    import jax

    first, count = jax.devices()[0], jax.device_count()
    facts: dict[str, Any] = {"count": count, "kind": first.device_kind, "platform": first.platform}
    text = f"{count} x {first.device_kind} ({first.platform})"
    if capability := getattr(first, "compute_capability", None):
        facts["compute_capability"] = str(capability)
        text += f", compute capability {capability}"
    card = nvidia()
    by_choice = config.runtime.platform or os.environ.get("JAX_PLATFORMS")
    if first.platform == "cpu" and card and by_choice:
        text += f"; {card['count']} x {card['name']} left alone, since the platform is set to {by_choice}"
    elif first.platform == "cpu" and card:
        extra = "cuda13" if _major(card["driver"]) >= 580 else "cuda12"
        fault = f"jax computes on the CPU, although there is {card['count']} x {card['name']}"
        return judge([fault], text, f"pip install 'aem_jax[{extra}]' (driver {card['driver']})", facts)
    elif card and int(card["count"]) > count:
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
    card = nvidia()
    # nvidia-smi reports the memory of the card, of which a MIG device is a part.
    if card and card["memory_mib"].isdigit() and card["mig"] != "Enabled":
        device_total = int(card["memory_mib"]) * MIB
        facts["device_total"] = device_total
        text += f" of {device_total / GIB:.1f}"
        if limit < 0.4 * device_total:
            faults.append("jax has less than 40 % of a device's memory")
            advice.append(
                "end the processes that use it (nvidia-smi), or raise XLA_PYTHON_CLIENT_MEM_FRACTION (default "
                f"{GPU_MEMORY_SHARE})"
            )
    return judge(faults, text, "; ".join(advice), facts)


def host_memory() -> tuple[int, int]:
    """Total bytes, and bytes free for new processes; of a container with a limit, those of its limit."""
    from aem_jax.envs.swe.sandbox.host import measure

    memory = measure()["memory_mib"]
    return int(memory.total * MIB), int(memory.free * MIB)


def disk(config: "DoctorConfig") -> Finding:
    """Whether the folder of runs is writable, and its free disk space."""
    folder = Path(config.runs_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
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
    faults = [] if is_same else ["a file written there has another content when it is read"]
    if free < need:
        faults.append(f"expected room for two checkpoints of {config.model}, {need / GIB:.1f} GiB")
    text = f"{free / GIB:.1f} GiB free in {folder}"
    return judge(faults, text, "free some space, or give another --runs-dir", {"free": free, "need": need})


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
    from aem_jax.envs.swe.sandbox.engine import probe

    return _sandbox(probe(engine), f"start a {engine} that this user may use")


def _sandbox(reason: str, advice: str) -> Finding:
    """A missing sandbox is not a fault: only the SWE environments need one, and one of the three is enough."""
    if not reason:
        return Finding(True, "works")
    return Finding(None, " ".join(reason.split())[:300], f"for SWE tasks alone: {advice}")
