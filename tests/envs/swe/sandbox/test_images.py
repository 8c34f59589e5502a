"""Images that are fetched ahead, and the bound on those that were fetched or made, with an engine of files."""

import json
import sys
import threading
import time

import pytest

from aem_jax.envs.swe.sandbox import images
from aem_jax.envs.swe.sandbox.images import Images, derived_name
from aem_jax.envs.swe.sandbox.pool import Prefetch
from aem_jax.envs.swe.sandbox.workspace import SandboxError

GIB = 2**30
# An image is a file with its size. Those of a registry have 1 GiB; a committed one has a quarter more than its parent.
ENGINE = f"""#!{sys.executable}
import json, os, sys
here, words = os.path.dirname(sys.argv[0]), sys.argv[1:]
print(json.dumps(words), file=open(here + "/log", "a"))
file = lambda name: here + "/images/" + name.replace("/", "_")
if words[:2] == ["image", "inspect"]:
    if not os.path.exists(file(words[-1])):
        sys.exit("no such image")
    print(open(file(words[-1])).read() if "Size" in words[3] else "sha256:" + words[-1])
elif words[:2] == ["image", "rm"]:
    if os.path.exists(here + "/used") and open(here + "/used").read() == words[-1]:
        sys.exit("image is in use by a container")
    os.remove(file(words[-1]))
elif words[0] == "pull":
    print({GIB}, file=open(file(words[1]), "w"))
elif words[0] == "run":
    open(here + "/parent", "w").write(words[words.index("bash") + 1])
elif words[0] == "commit":
    size = int(open(file(open(here + "/parent").read())).read())
    print(size + {GIB // 4}, file=open(file(words[2]), "w"))
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(images, "_NOTE_S", 0.0)
    (tmp_path / "images").mkdir()
    path = tmp_path / "engine"
    path.write_text(ENGINE)
    path.chmod(0o755)
    return path


def there(engine) -> set[str]:
    """The images, prepared ones by a star and their number."""
    names = [path.name for path in (engine.parent / "images").iterdir()]
    made = sum(name.startswith("localhost") for name in names)
    return {name for name in names if not name.startswith("localhost")} | {f"*{made}"}


def test_those_that_were_not_used_for_longest_are_removed_with_what_was_made_of_them(engine):
    (engine.parent / "images" / "mine").write_text(str(GIB))
    store = Images(str(engine), most_gib=2.8)
    for name in ("mine", "one", "two"):  # 0.25, 1.25 and 1.25 GiB
        store.prepare(name, "/testbed", owned=True)
    assert there(engine) == {"mine", "one", "two", "*3"}
    Images(str(engine), most_gib=2.8).prepare("one", "/testbed", owned=True)  # another process uses it
    store.prepare("three", "/testbed", owned=True)
    assert there(engine) == {"mine", "one", "three", "*2"}  # `mine` was there before, so only its layer is removed
    store.prepare("mine", "/testbed", owned=True)
    assert there(engine) == {"mine", "one", "three", "*3"}


def test_an_image_in_use_stays_and_without_a_bound_all_do(engine):
    (engine.parent / "used").write_text("one")
    store = Images(str(engine), most_gib=1.5)
    for name in ("one", "two", "three"):
        store.image_id(name)
    assert there(engine) == {"one", "three", "*0"}
    for name in ("four", "five"):
        Images(str(engine)).image_id(name)
    assert there(engine) == {"one", "three", "four", "five", "*0"}


def test_a_removed_image_is_made_again_once_the_engine_says_so(engine):
    store = Images(str(engine), most_gib=9)
    name = store.prepare("one", "/testbed", owned=True)
    (engine.parent / "images" / name.replace("/", "_")).unlink()
    assert store.prepare("one", "/testbed", owned=True) == name and there(engine) == {"one", "*0"}
    store.forget()
    store.prepare("one", "/testbed", owned=True)
    assert there(engine) == {"one", "*1"}
    assert derived_name("a", "b") != derived_name("ab")


def test_one_of_many_fetches(engine):
    stores = [Images(str(engine), most_gib=9) for _ in range(4)]
    threads = [threading.Thread(target=store.image_id, args=("one",)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = [json.loads(line) for line in (engine.parent / "log").read_text().splitlines()]
    assert [call[0] for call in calls].count("pull") == 1


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_upcoming_tasks_are_fetched_until_they_fill_the_bound(engine):
    store, fetched = Images(str(engine), most_gib=2), []
    store.image_id("old")

    def fetch(name: str, since: float) -> bool:
        if name == "broken":
            raise SandboxError("there is no such image")
        store.image_id(name)
        fetched.append(name)
        return store.has_room(since)

    prefetch = Prefetch(fetch)
    prefetch(["one", "broken", "two", "three"])
    wait_until(lambda: not prefetch._runs)
    assert fetched == ["one", "two"] and there(engine) == {"one", "two", "*0"}
    prefetch([])
    assert not prefetch._runs


def test_a_new_list_replaces_the_old_one():
    begun, proceed, fetched = threading.Event(), threading.Event(), []

    def fetch(name: str, since: float) -> bool:
        fetched.append(name)
        begun.set()
        return proceed.wait(30)

    prefetch = Prefetch(fetch)
    prefetch(["one", "two"])
    assert begun.wait(30)
    prefetch(["three"])
    proceed.set()
    wait_until(lambda: not prefetch._runs)
    assert fetched == ["one", "three"]
