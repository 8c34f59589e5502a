import dataclasses
import os
import subprocess

import pytest
from envs.swe.samples import ROW

from aem_jax.envs.swe import repos
from aem_jax.envs.swe.instance import from_row
from aem_jax.envs.swe.repos import commit_id, files_checkout, mirror_checkout

SECRET = "return (low + high) / 2  # the fix"
FILES = {
    "calc.py": "x = 1\n",
    "a/b/deep.txt": "deep\n",
    "a.txt": "sorts after the folder's name\n",
    "z": "",
}


def git(folder, *arguments: str) -> str:
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture
def history(tmp_path):
    """A repository and its base commit. A later commit, tag, stash, reflog and dangling object contain the fix."""
    repo = tmp_path / "mirrors" / "own__calc"
    repo.mkdir(parents=True)
    git(repo, "init", "--quiet", "-b", "main")
    (repo / "calc.py").write_text("def median(xs):\n    return xs[0]\n")
    (repo / "kept.log").write_text("tracked, though ignored\n")
    (repo / ".gitignore").write_text("*.log\n")
    (repo / ".gitattributes").write_text("kept.log export-ignore\n")
    (repo / "link").symlink_to("calc.py")
    git(repo, "add", "-A", "-f")
    git(repo, "commit", "-qm", "base")
    base = git(repo, "rev-parse", "HEAD").strip()
    (repo / "calc.py").write_text(SECRET + "\n")
    git(repo, "commit", "-qam", "fix the median")
    git(repo, "tag", "-a", "v2", "-m", "holds the fix")
    git(repo, "remote", "add", "origin", "https://example.invalid/own/calc")
    (repo / "calc.py").write_text(SECRET + "  # stashed\n")
    git(repo, "stash")
    git(repo, "gc", "--quiet")
    return repo, base


def everything_in(folder) -> str:
    """The full content of the repository's objects, refs and reflogs, as text."""
    ids = [line.split()[0] for line in git(folder, "cat-file", "--batch-all-objects", "--batch-check").splitlines()]
    objects = "".join(git(folder, "cat-file", "-p", object_id) for object_id in ids)
    loose = "".join(path.read_text(errors="replace") for path in (folder / ".git").rglob("*") if path.is_file())
    return objects + loose + git(folder, "log", "--all", "-p") + git(folder, "fsck", "--lost-found")


@pytest.mark.parametrize("bare", [False, True])
def test_a_checkout_has_the_files_of_its_base_commit_and_no_later_work(history, tmp_path, bare):
    repo, base = history
    folder = repo.parent
    if bare:
        folder = tmp_path / "bare"
        git(tmp_path, "clone", "--quiet", "--mirror", str(repo), str(folder / "own__calc.git"))
    assert SECRET in everything_in(repo)  # the secret is in the original
    work = tmp_path / "work"
    work.mkdir()
    mirror_checkout(folder)(dataclasses.replace(from_row(ROW), base_commit=base), work)

    assert (work / "calc.py").read_text() == "def median(xs):\n    return xs[0]\n"
    assert (work / "kept.log").read_text() == "tracked, though ignored\n"  # an archive would omit it
    assert os.readlink(work / "link") == "calc.py"
    assert git(work, "status", "--porcelain") == ""
    content = everything_in(work)
    assert "the fix" not in content and "fix the median" not in content and "example.invalid/own" not in content
    assert git(work, "rev-list", "--all", "--count").strip() == "1"
    assert git(work, "for-each-ref", "--format=%(refname)").split() == ["refs/heads/main", f"refs/replace/{base}"]
    assert git(work, "remote") == git(work, "reflog", "--all") == ""
    assert not (work / ".git/hooks").exists() and not (work / ".git/objects/info/alternates").exists()
    assert not list((work / ".git/objects/pack").glob("*"))


def test_the_name_of_the_base_commit_still_works(history, tmp_path):
    repo, base = history
    work = tmp_path / "work"
    work.mkdir()
    mirror_checkout(repo.parent)(dataclasses.replace(from_row(ROW), base_commit=base), work)
    (work / "calc.py").write_text("broken\n")
    assert "-def median" in git(work, "diff", base)
    git(work, "checkout", base, "calc.py")
    assert (work / "calc.py").read_text() == "def median(xs):\n    return xs[0]\n"


def test_missing_mirrors_and_commits_are_refused(history, tmp_path):
    repo, _ = history
    with pytest.raises(ValueError, match="found no folder"):
        mirror_checkout(tmp_path / "nowhere")
    checkout = mirror_checkout(repo.parent)
    with pytest.raises(ValueError, match=r"a mirror of other/calc .* git clone --mirror"):
        checkout(dataclasses.replace(from_row(ROW), repo="other/calc"), tmp_path)
    with pytest.raises(ValueError, match=r"expected commit aaaa.* update the mirror"):
        checkout(from_row(ROW), tmp_path)
    with pytest.raises(ValueError, match="base_commit as 40 hex digits"):
        checkout(dataclasses.replace(from_row(ROW), base_commit="--help"), tmp_path)


def test_files_make_a_commit_whose_id_is_known_beforehand(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files_checkout(FILES)(from_row(ROW), tmp_path / name)
        assert git(tmp_path / name, "rev-parse", "HEAD").strip() == commit_id(FILES)
    assert (tmp_path / "one/a/b/deep.txt").read_text() == "deep\n"
    assert commit_id(FILES) != commit_id(FILES | {"z": "z"})


@pytest.mark.parametrize("path", ["/etc/passwd", "../out", "a/../../out", ".git/hooks/post-checkout"])
def test_paths_outside_the_repository_are_refused(path):
    with pytest.raises(ValueError, match="relative paths inside the repository"):
        files_checkout({path: ""})


def test_git_output_need_not_be_utf_8(tmp_path):
    git(tmp_path, "init", "--quiet")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        repos._git(tmp_path, "rev-parse", b"no-\xff".decode(errors="surrogateescape"))
    assert "no-\ufffd" in raised.value.stderr
