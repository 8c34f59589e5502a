"""Prepared images: an instance's image, changed once so that a user without privileges can work in it.

Published images are built for root: interpreters lie below `/root`, which others cannot enter, and the repository
belongs to root. A container of the image runs a script as root, before any code of an agent, and is committed as an
image of the engine. In it, all users can read `/root`, the commands' user owns the repository, `/testbed` is a link to
the repository if it lies elsewhere, and hidden tests are moved from the root into the repository, from where
`patches.set_aside` takes them.

A layer was chosen over two other ways. A user namespace that maps root to another user needs a setting of the engine's
daemon, and gives untrusted code the user id 0. A copy of the interpreter breaks the absolute paths in it.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.sandbox.engine import run_engine
from aem_jax.envs.swe.sandbox.host import locked, owner, user_folder
from aem_jax.envs.swe.sandbox.mounts import USER_ID
from aem_jax.envs.swe.sandbox.workspace import SandboxError

USER = f"{USER_ID}:{USER_ID}"

_PREPARE = r"""
set -e
folder=$1 user=$2 make=$3
shift 3
if [ -n "$make" ]; then mkdir -p "$folder"; fi
[ -d "$folder" ] || { echo "the image has no folder $folder"; exit 1; }
if [ "$folder" != /testbed ]; then
  [ ! -d /testbed ] || rmdir /testbed
  ln -s "$folder" /testbed
fi
for name in "$@"; do  # /testbed may have a link to the folder in the root
  rm -rf -- "/testbed/$name"
  if [ -d "/$name" ]; then mv -- "/$name" "/testbed/$name"; else mkdir -- "/testbed/$name"; fi
done
if [ -d /root ]; then
  find /root -xdev \( -type d ! -perm -005 -o -type f ! -perm -004 \) -exec chmod o+rX {} +
fi
if [ -n "$user" ]; then chown -hR "$user" "$folder"; fi
"""
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER")
PREPARED = "localhost/aem-swe"
"""Name of the prepared images; `docker image ls localhost/aem-swe` lists them."""


OWNER = "aem-jax.owner"
"""Label of this program's containers: the process that they belong to."""
_NOTE_S = 60.0
_log = logging.getLogger(__name__)


class Images:
    """The images of an engine, given by its name or path.

    Images that this program fetched or made are noted in a file that all processes of the user share. If they take more
    than `most_gib`, those of the source that was not used for longest are removed. An image in use is not removed, nor
    is one that the program found.

    Args:
        engine: its name or path.
        most_gib: bound on their disk, GiB; 0 sets none, and nothing is noted.
    """

    def __init__(self, engine: str, most_gib: float = 0.0):
        self._engine, self._most_bytes = engine, most_gib * 2**30
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._ready: dict[tuple[str, ...], str] = {}  # saves two calls of the engine for each workspace
        self._noted: dict[str, float] = {}

    def image_id(self, image: str) -> str:
        """Returns an image's id, after pulling the image if it is not there.

        Raises:
            SandboxError: there is no such image.
        """
        inspect = [self._engine, "image", "inspect", "--format", "{{.Id}}", image]
        self._note(image)
        with contextlib.suppress(SandboxError):
            return run_engine(inspect).strip()
        with self._made_once(image):  # of all processes, one pulls
            with contextlib.suppress(SandboxError):
                return run_engine(inspect).strip()
            run_engine([self._engine, "pull", image])
            self._note(image, pulled=True, size=self._size(image))
            return run_engine(inspect).strip()

    def prepare(self, image: str, folder: str, *, owned: bool, make: bool = False, moved: Sequence[str] = ()) -> str:
        """Returns the name of the prepared image of an image; makes it if it is not there.

        Args:
            image: the image.
            folder: the repository's folder in it.
            owned: whether the commands' user owns the repository. It takes as much disk as the repository, once.
            make: whether the folder is made if it does not exist.
            moved: folders of the root that are moved into the repository.

        Raises:
            SandboxError: there is no such image, it has no repository, or the engine failed.
        """
        words = [folder, USER if owned else "", "make" if make else "", *moved]
        self._note(image)
        if ready := self._ready.get((image, *words)):
            return ready

        def prepare() -> None:
            container = container_name()
            command = [self._engine, "run", "--name", container, *owner_label(), "--network", "none", "--user", "0:0"]
            command += [
                "--cap-drop",
                "ALL",
                *(word for capability in _CAPABILITIES for word in ("--cap-add", capability)),
            ]
            command += ["--security-opt", "no-new-privileges", "--workdir", "/", "--entrypoint", "bash"]
            try:
                run_engine([*command, image, "-c", _PREPARE, "prepare", *words])
                run_engine([self._engine, "commit", container, name])
            except SandboxError as error:
                raise SandboxError(f"the image {image} could not be prepared: {error}") from None
            finally:
                with contextlib.suppress(SandboxError):
                    run_engine([self._engine, "rm", "--force", container])

        name = derived_name(self.image_id(image), _PREPARE, *words)
        self.derive(name, image, image, prepare)
        return self._ready.setdefault((image, *words), name)

    def derive(self, name: str, parent: str, source: str, make: Callable[[], None]) -> str:
        """Returns an image's name, after `make` made it if it is not there. Of all processes, one makes it.

        Args:
            name: of the image, from `derived_name`.
            parent: the image that it adds files to.
            source: the image with whose use the new one is kept.
            make: makes it.

        Raises:
            SandboxError: of `make`.
        """
        if (name,) in self._ready:
            return name
        with self._made_once(name):
            try:
                run_engine([self._engine, "image", "inspect", "--format", "{{.Id}}", name])
            except SandboxError:
                make()
                self._note(source, made=name, size=self._size(name) - self._size(parent))
        return self._ready.setdefault((name,), name)

    def note_made(self, image: str) -> None:
        """Notes an image that was built elsewhere in this program."""
        self._note(image, made=image, size=self._size(image))

    def has_room(self, since: float) -> bool:
        """Whether images that were used since a time, seconds since the epoch, take less than the bound."""
        if not self._most_bytes:
            return True
        file = self._notes_file()
        with locked(file.with_suffix(".lock")):
            notes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return sum(note["bytes"] for note in notes.values() if note["used"] >= since) < self._most_bytes

    def forget(self) -> None:
        """Makes the next calls ask the engine again, for example because images were removed."""
        self._ready.clear()

    @contextlib.contextmanager
    def _made_once(self, name: str) -> Iterator[None]:
        """Lets one thread of one process make an image; only those that need the same image wait."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        digest = hashlib.sha256(f"{self._engine}\0{name}".encode()).hexdigest()[:24]
        with lock, locked(user_folder() / f"image-{digest}.lock"):
            yield

    def _size(self, image: str) -> int:
        if not self._most_bytes:
            return 0
        text = run_engine([self._engine, "image", "inspect", "--format", "{{.Size}}", image]).strip()
        return int(text) if text.isdigit() else 0

    def _note(self, source: str, *, pulled: bool = False, made: str = "", size: int = 0) -> None:
        """Notes that an image is used, and what was fetched or made for it; then removes others beyond the bound."""
        is_new = pulled or bool(made)
        if not self._most_bytes or (not is_new and time.monotonic() - self._noted.get(source, -_NOTE_S) < _NOTE_S):
            return
        self._noted[source] = time.monotonic()
        file = self._notes_file()
        with locked(file.with_suffix(".lock")):
            notes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if is_new or source in notes:
                note = notes.setdefault(source, {"pulled": False, "made": [], "bytes": 0})
                note |= {"pulled": note["pulled"] or pulled, "bytes": note["bytes"] + max(size, 0), "used": time.time()}
                note["made"] += [made] if made else []
            if is_new:
                self._remove_oldest(notes, keep=source)
            scratch = file.with_suffix(".new")
            scratch.write_text(json.dumps(notes), encoding="utf-8")
            scratch.replace(file)

    def _notes_file(self) -> Path:
        return user_folder() / f"images-{hashlib.sha256(self._engine.encode()).hexdigest()[:12]}.json"

    def _remove_oldest(self, notes: dict[str, Any], keep: str) -> None:
        for source in sorted(notes, key=lambda source: notes[source]["used"]):
            if sum(note["bytes"] for note in notes.values()) <= self._most_bytes:
                return
            note = notes[source]
            names = [*reversed(note["made"]), *([source] if note["pulled"] else [])]
            if source == keep or not names:
                continue
            try:
                for name in names:  # the last layer first
                    self._remove(name)
            except SandboxError as error:
                _log.info("the image %s is kept: %s", source, error)
                continue
            _log.info("removed the image %s, which was not used for longest", source)
            del notes[source]
            self._ready = {key: name for key, name in self._ready.items() if key[0] != source and name not in names}

    def _remove(self, name: str) -> None:
        """Removes an image; one that is not there counts as removed.

        Raises:
            SandboxError: it is in use.
        """
        try:
            run_engine([self._engine, "image", "rm", name])
        except SandboxError as error:
            try:
                run_engine([self._engine, "image", "inspect", "--format", "{{.Id}}", name])
            except SandboxError:
                return
            raise error


def derived_name(*contents: str) -> str:
    """Returns the name of an image that is made from an image and with scripts; it changes with any of them."""
    return f"{PREPARED}:{hashlib.sha256(chr(0).join(contents).encode(errors='surrogateescape')).hexdigest()[:24]}"


def container_name() -> str:
    """Returns a new name for a container of this process."""
    return f"aem-swe-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def owner_label() -> tuple[str, str]:
    """Returns the engine's option that labels a container as one of this process."""
    return "--label", f"{OWNER}={owner()}"
