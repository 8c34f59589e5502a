import json
from dataclasses import replace

import pytest
from envs.swe.sandboxes import CHECKOUT, FILES, INSTANCE, QUICK, working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.swe.patches import model_patch, save_base
from aem_jax.envs.swe.sandbox.workspace import WorkspaceError
from aem_jax.envs.swe.tools import LARGEST_FILE, RECIPES, Tools, describe

TEXT = "one\ntwo\nthree\ntwo\n"


@pytest.fixture(scope="module")
def workspace():
    workspace = working_bubblewrap().open(INSTANCE, CHECKOUT, limits=QUICK)
    yield workspace
    workspace.close()


@pytest.fixture
def tools(workspace):
    workspace.write("text.txt", TEXT.encode())
    return Tools(workspace, QUICK, 2000)


def edit(tools: Tools, command: str, path: str = "text.txt", **parameters: str) -> str:
    result = tools.execute(block("file_editor", command=command, path=path, **parameters))
    assert result.valid, result
    return result.text


def refused(tools: Tools, name: str, **parameters: str) -> str:
    result = tools.execute(block(name, **parameters))
    assert not result.valid and not result.finished
    return result.text


def test_bash_returns_output_and_exit_code(tools):
    assert tools.execute(block("execute_bash", command="echo a; echo b >&2; exit 3")).text == "a\nb\n[exit code 3]"
    assert tools.execute(block("execute_bash", command="true")).text == "[exit code 0]"
    assert len(tools.execute(block("execute_bash", command="seq 100000")).text) < 2200
    assert refused(tools, "execute_bash", script="ls") == (
        "ERROR: expected the parameter 'command' for execute_bash, got script"
    )
    two = block("execute_bash", command="echo 1") + block("execute_bash", command="echo 2")
    assert tools.execute(two).text == "[one call a response: only the last of 2 was carried out]\n2\n[exit code 0]"


def test_bash_is_killed_at_its_deadline(workspace):
    quick = Tools(workspace, replace(QUICK, seconds=0.3))
    assert quick.execute(block("execute_bash", command="echo a; sleep 9")).text == "a\n[killed: not done after 0.3 s]"


def test_a_recipe_has_its_words_and_limits(workspace):
    recipe = RECIPES["r2e-gym"]
    tools = Tools(workspace, replace(QUICK, file_mib=1), 500, recipe=recipe)
    bash = lambda command: tools.execute(block("execute_bash", command=command)).text
    head, divider = "Execution output of [execute_bash]:\n", "-" * 50
    assert bash("echo a; exit 3") == f"Exit code: 3\n{head}a"
    assert bash("true") == f"Exit code: 0\n{head}"
    assert bash("seq 200") == f"Exit code: 0\n{head}" + "\n".join(map(str, range(1, 201)))
    shown = [*range(1, 101), divider, "<800 lines are not shown>", divider, *range(901, 1001)]
    assert bash("seq 1000") == f"Exit code: 0\n{head}" + "\n".join(map(str, shown))
    long = bash("printf '%050000d' 1")
    assert long.startswith(f"Exit code: 0\n{head}000") and long.endswith("0001") and len(long) < 10_200
    assert "\n<response clipped: 40000 characters are not shown>\n" in long
    late = Tools(workspace, replace(QUICK, seconds=0.3), recipe=recipe)
    result = late.execute(block("execute_bash", command="echo a; sleep 9")).text
    assert result == f"Exit code: -1\n{head}a\nkilled: not done after 0.3 s"
    workspace.write("long.txt", b"".join(b"%d\n" % number for number in range(1, 401)))
    lines = edit(tools, "view", path="long.txt").split("\n")
    assert lines[:2] == ["Execution output of [file_editor]:", "     1\t1"]
    assert lines[100:104] == ["   100\t100", divider, "<201 lines are not shown>", divider]
    assert lines[104] == "   302\t302" and len(lines) == 204
    assert edit(tools, "view", path="long.txt", view_range="[150, 151]").endswith(":\n   150\t150\n   151\t151")
    found = tools.execute(block("search", search_term="xs", path="calc.py")).text
    assert found.startswith("Execution output of [search]:\n1:def mean(xs):\n")
    workspace.run("rm long.txt")
    assert tools.execute(block("execute_bash")).text.startswith("ERROR: ")
    assert tools.execute(block("finish", command="submit")).finished
    text = describe(recipe=recipe)
    assert "more than 200 lines, the first and last 100 are shown; of these at most 10000 characters" in text
    assert "are shown" not in describe()


def test_observations_are_valid_text(tools):
    text = tools.execute(block("execute_bash", command=r"printf '\e[31mred\e[0m a\rb\x00\x07\xff\xe2\x80\xae'")).text
    assert text == "red a\nb������\n[exit code 0]".replace("������", "����")
    json.dumps(text).encode()


def test_view_shows_numbered_lines_and_folders(tools):
    assert edit(tools, "view") == "     1\tone\n     2\ttwo\n     3\tthree\n     4\ttwo\n     5\t"
    assert edit(tools, "view", view_range="[2, 3]") == "     2\ttwo\n     3\tthree"
    assert edit(tools, "view", view_range="[4, -1]") == "     4\ttwo\n     5\t"
    assert edit(tools, "view", path="/testbed").splitlines() == [f"/testbed/{name}" for name in [*FILES, "text.txt"]]
    assert "no /testbed/nothing" in edit(tools, "view", path="nothing")
    assert "within the lines 1 to 5" in refused(
        tools, "file_editor", command="view", path="text.txt", view_range="[9,9]"
    )
    tools.execute(block("execute_bash", command="seq 10000 > long; mkfifo fifo; truncate -s 5M large"))
    assert "[cut at line" in edit(tools, "view", path="long") and len(edit(tools, "view", path="long")) < 2200
    assert "got a fifo" in edit(tools, "view", path="fifo")
    assert f"at most {LARGEST_FILE} bytes" in edit(tools, "view", path="large")
    tools.execute(block("execute_bash", command="rm long fifo large"))


def test_str_replace_needs_a_unique_match(tools, workspace):
    assert edit(tools, "str_replace", old_str="three", new_str="3\n3") == (
        "/testbed/text.txt was edited:\n     1\tone\n     2\ttwo\n     3\t3\n     4\t3\n     5\ttwo\n     6\t"
    )
    assert "stands 2 times in /testbed/text.txt, at lines 2, 5" in edit(tools, "str_replace", old_str="two", new_str="")
    assert "does not stand in" in edit(tools, "str_replace", old_str="three")
    assert workspace.read("text.txt") == b"one\ntwo\n3\n3\ntwo\n"


def test_edits_keep_invalid_utf_8(tools, workspace):
    workspace.write("text.txt", b"\xff\r\none\r\n")
    edit(tools, "str_replace", old_str="one", new_str="1")
    assert workspace.read("text.txt") == b"\xff\r\n1\r\n"


def test_insert_adds_lines(tools, workspace):
    edit(tools, "insert", insert_line="0", new_str="zero")
    edit(tools, "insert", insert_line="5", new_str="end")
    assert workspace.read("text.txt") == b"zero\none\ntwo\nthree\ntwo\nend\n"
    assert "from 0 to 6" in refused(
        tools, "file_editor", command="insert", path="text.txt", insert_line="7", new_str=""
    )
    assert "line number" in refused(
        tools, "file_editor", command="insert", path="text.txt", insert_line="x", new_str=""
    )


def test_create_can_be_undone(tools, workspace):
    assert edit(tools, "create", path="deep/er/new.py", file_text="x = 1\n") == "/testbed/deep/er/new.py was created"
    assert edit(tools, "create", path="deep/er/new.py", file_text="x = 2\n").endswith("was overwritten")
    edit(tools, "undo_edit", path="deep/er/new.py")
    assert workspace.read("deep/er/new.py") == b"x = 1\n"
    edit(tools, "undo_edit", path="deep/er/new.py")
    with pytest.raises(WorkspaceError):
        workspace.read("deep/er/new.py")
    assert "no edit of" in edit(tools, "undo_edit", path="deep/er/new.py")
    assert "got the folder" in edit(tools, "create", path="/testbed", file_text="")
    assert "ERROR" in edit(tools, "create", path="/usr/x", file_text="")


def test_search_is_literal(tools):
    def search(**parameters: str) -> str:
        return tools.execute(block("search", **parameters)).text

    assert search(search_term="three") == "/testbed/text.txt:3:three"
    assert search(search_term="th(ree") == "no match for 'th(ree' in /testbed"
    assert search(search_term="xs", path="calc.py").splitlines() == [
        "1:def mean(xs):",
        "2:    return sum(xs) / (len(xs) - 1)",
    ]
    assert "ERROR" in search(search_term="x", path="nowhere")
    assert search(search_term="-e one").startswith("no match")
    tools.execute(block("execute_bash", command="yes needle | head -1000 > hay"))
    lines = search(search_term="needle").splitlines()
    assert lines[-1] == "[more matches are not shown]" and lines[-2].startswith("/testbed/hay:")
    assert sum(map(len, lines)) < 2200
    tools.execute(block("execute_bash", command="rm hay"))


def test_finish_ends_the_episode_and_other_names_are_refused(tools):
    assert tools.execute("<function=finish>\n</function>") == ("", True, True)
    assert "expected a tool of execute_bash, file_editor, search, finish" in refused(tools, "bash", command="ls")
    assert not tools.execute("").valid


def test_links_do_not_lead_outside_the_sandbox(tools, workspace, tmp_path):
    (tmp_path / "secret").write_text("secret")
    links = {"a": tmp_path / "secret", "b": "/proc/1/environ", "c": tmp_path, "d": "/etc/shadow"}
    for name, target in links.items():
        tools.execute(block("execute_bash", command=f"ln -s {target} {name}"))
    for name in ("a", "b", "d", "c/secret"):
        assert edit(tools, "view", path=name).startswith("ERROR"), name
    edit(tools, "create", path="a", file_text="mine")
    edit(tools, "create", path="c/secret", file_text="mine")
    assert (tmp_path / "secret").read_text() == "secret"
    tools.execute(block("execute_bash", command="rm a b c d"))


CHANGE = "sed -i 's/ - 1//' calc.py"
HOSTILE_GIT = """
cd /testbed
git config core.fsmonitor 'touch /testbed/ran; false'
git config core.pager 'touch /testbed/ran; cat'
git config core.hooksPath /testbed/hooks
git config diff.external 'touch /testbed/ran; true'
git config diff.x.textconv 'touch /testbed/ran; echo'
git config diff.x.command 'touch /testbed/ran; true'
git config filter.x.clean 'touch /testbed/ran; echo cleaned'
git config filter.x.smudge 'touch /testbed/ran; cat'
git config alias.diff '!touch /testbed/ran'
git config core.attributesFile /testbed/.git/attributes
cp .git/config /tmp/.gitconfig; mkdir -p /tmp/.config/git; cp .git/config /tmp/.config/git/config
echo '* filter=x diff=x' | tee .git/attributes .git/info/attributes > .gitattributes
mkdir -p hooks .git/hooks; for h in pre-commit post-index-change post-checkout fsmonitor-watchman; do
    printf '#!/bin/bash\ntouch /testbed/ran\n' | tee hooks/$h > .git/hooks/$h; chmod +x hooks/$h .git/hooks/$h
done
echo '*.py' >> .git/info/exclude
rm -f ran
"""
"""All ways in which git settings can run programs."""

MOVES = {
    "hooks, filters, drivers, aliases": HOSTILE_GIT,
    "a commit": f"{CHANGE}; git commit -qam mine",
    "no repository": "rm -rf .git",
    "another repository": f"rm -rf .git; git init -q; {CHANGE}; git add -A; git commit -qm x",
    "a repository elsewhere": "mv .git /tmp/moved; echo gitdir: /tmp/moved > .git",
    "a repository inside": "git init -q sub; git -C sub commit -q --allow-empty -m x",
    "files that cannot be read": "mkdir no; echo x > no/x; chmod 0 no test_calc.py; mkfifo f",
    "a full /tmp": "head -c 20M /dev/zero > /tmp/full; mkdir /tmp/base",
    "an index that says nothing changed": "git update-index --assume-unchanged calc.py",
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_patch_does_not_depend_on_the_agents_git_settings(move):
    workspace = working_bubblewrap().open(INSTANCE, CHECKOUT, limits=QUICK)
    base = save_base(workspace)
    workspace.run(f"{move}\n{CHANGE}")
    patch = model_patch(workspace, base, limits=QUICK, max_bytes=10**6)
    changed = patch.partition("diff --git a/calc.py b/calc.py\n")[2]
    assert "-    return sum(xs) / (len(xs) - 1)\n+    return sum(xs) / (len(xs))\n" in changed
    assert "test_calc.py" not in patch
    ran = workspace.run("ls ran")
    workspace.close()
    assert "No such file" in ran.output


def test_a_patch_that_is_too_large_is_refused():
    workspace = working_bubblewrap().open(INSTANCE, CHECKOUT, limits=QUICK)
    base = save_base(workspace)
    workspace.run("head -c 1M /dev/urandom > noise")
    with pytest.raises(WorkspaceError, match="expected a patch of at most 1000 bytes"):
        model_patch(workspace, base, limits=QUICK, max_bytes=1000)
    workspace.close()
    with pytest.raises(WorkspaceError, match="no patch could be made: closed"):
        model_patch(workspace, base, limits=QUICK, max_bytes=1000)
