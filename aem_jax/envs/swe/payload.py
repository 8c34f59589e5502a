"""Converts between a task's JSON payload and its instance and repository. The payload has one of three forms:

{"instance": {<SWE-bench's columns>}, "files": {"calc.py": "…"}}      the repository as text files
{"instance": {<SWE-bench's columns>}, "repos": "/data/mirrors"}       the repository in a folder of git mirrors
{"instance": {<SWE-bench's columns>}}                                 the repository in the instance's image
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.instance import Instance, from_row, to_row
from aem_jax.envs.swe.repos import files_checkout, mirror_checkout
from aem_jax.envs.swe.sandbox.workspace import Checkout
from aem_jax.files import parse_json


def make_payload(instance: Instance, *, files: Mapping[str, str] | None = None, repos: str = "") -> dict[str, Any]:
    """Returns an instance's payload; its repository is given as files, in a folder of mirrors, or in its image."""
    where = {"files": dict(files)} if files is not None else {"repos": repos} if repos else {}
    return {"instance": to_row(instance), **where}


def load_task(payload: Mapping[str, Any]) -> tuple[Instance, Checkout]:
    """Parses a payload.

    Raises:
        ValueError: the payload has none of the forms in the module's docstring.
    """
    row, where = payload.get("instance"), {name: payload[name] for name in ("files", "repos") if name in payload}
    files, repos = where.get("files", {}), where.get("repos", "")
    texts = isinstance(files, Mapping) and all(isinstance(text, str) for item in files.items() for text in item)
    if not isinstance(row, Mapping) or len(where) > 1 or not texts or not isinstance(repos, str):
        raise ValueError(
            "expected a payload with 'instance', a mapping of SWE-bench's columns, and at most one of 'files' "
            f"(path -> text) and 'repos' (a folder of mirrors), got keys {sorted(payload)}"
        )
    return _load(json.dumps(dict(row), sort_keys=True), json.dumps(where, sort_keys=True))


@lru_cache(maxsize=64)
def _load(row: str, where: str) -> tuple[Instance, Checkout]:
    """Returns the same objects for equal payloads, so that a group's attempts share what is derived from them."""
    instance, place = from_row(parse_json(row, "instance")), parse_json(where, "payload")
    if "files" in place:
        return instance, files_checkout(place["files"])
    if "repos" in place:
        return instance, mirror_checkout(place["repos"])
    return instance, _no_checkout


def _no_checkout(instance: Instance, folder: Path) -> None:
    raise ValueError(
        f"expected 'files' or 'repos' in the payload of {instance.instance_id!r}, got neither (a run's "
        "--swe.tasks.repos or the check's --repos gives a folder of git mirrors); without them the "
        "repository comes from the instance's image, for which the runtime has to be docker or podman"
    )
