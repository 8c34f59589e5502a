"""A container engine for tests: records its arguments, and runs `exec` in bubblewrap, on a folder per container.

It is what docker does, as far as the adapter depends on it: images have a user and a work folder, files that a command
writes stay, /usr is the host's. It limits nothing.
"""

import json
import os
import stat
import sys
from pathlib import Path

from aem_jax.envs.swe.sandbox.containers import Containers

SCRIPT = f"""#!{sys.executable}
import json, os, shutil, subprocess, sys
here, words = os.path.dirname(sys.argv[0]), sys.argv[1:]
with open(here + "/log", "a") as log:
    print(json.dumps(words), file=log)
folder = lambda kind, name: here + "/" + kind + "/" + name.replace("/", "_").replace(":", "_")
after = lambda option: words[words.index(option) + 1]
if words[0] == "image":
    if not os.path.exists(folder("images", words[-1])):
        sys.exit("no such image")
    print("worker|/app" if "Config" in words[3] else "sha256:0")
elif words[0] == "build":
    if os.path.exists(here + "/broken"):
        sys.exit("COPY failed")
    shutil.copytree(words[-1], folder("images", after("--tag")) + "/app")
elif words[0] == "run":
    image = words[words.index("--entrypoint") + 2]
    root = folder("containers", after("--name"))
    shutil.copytree(folder("images", image), root)
    os.mkdir(root + "/tmp")
    for name in ("bin", "lib", "lib64", "sbin"):
        os.symlink("usr/" + name, root + "/" + name)
    print("started", flush=True)
    sys.stdin.read()
elif os.path.exists(here + "/dead"):
    sys.exit("Cannot connect to the daemon")
elif words[0] == "exec" and "kill -KILL -1" in words[-1]:
    print("kills")
    sys.exit(1)  # there is nothing to kill: no process outlives the namespace of its command
elif words[0] == "exec":
    at = next(i for i, word in enumerate(words) if word.startswith("aem-harbor-"))
    user = {{"root": "0", "0:0": "0", "worker": "1000"}}.get(after("--user"), after("--user").partition(":")[0])
    command = ["bwrap", "--bind", folder("containers", words[at]), "/", "--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    command += ["--dev", "/dev", "--unshare-all", "--as-pid-1", "--die-with-parent", "--uid", user, "--gid", user]
    command += ["--clearenv", "--setenv", "PATH", "/usr/bin", "--chdir", after("--workdir")]
    sys.exit(subprocess.run([*command, "--", *words[at + 1 :]]).returncode)
"""


class Engine:
    """The engine, and what it recorded."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "engine"
        self.path.write_text(SCRIPT)
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        for name in ("images", "containers"):
            (folder / name).mkdir()

    def image(self, name: str) -> None:
        """Adds an image with an empty /app."""
        os.makedirs(self.folder / "images" / name.replace("/", "_").replace(":", "_") / "app")

    def runtime(self, name: str = "docker") -> Containers:
        """Returns a runtime that uses the engine."""
        return Containers(name, engine=str(self.path))

    def calls(self, first: str = "") -> list[list[str]]:
        """Returns the recorded calls, or those of one command."""
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        return [call for call in map(json.loads, lines) if not first or call[0] == first]
