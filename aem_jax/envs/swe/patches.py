"""What the agent changed, as a patch: the work tree against the repository as it was before the agent saw it.

The agent's own `.git` has no say: its hooks, configuration, attributes and index may run programs or hide changes, and
its HEAD moves when the agent commits. So the repository's data are put aside before the first command and put back into
an empty folder afterwards. All of it happens inside the sandbox; the host sees bytes, of bounded number.
"""

from dataclasses import replace

from aem_jax.envs.swe.sandbox import Limits, SandboxError, Workspace, WorkspaceError

_SAVE = "tar --create --file=/tmp/.base.tar .git"

# Whatever the agent left in /tmp, its git configuration included, goes first. Repositories inside the work tree would
# become references to commits that nobody has.
_DIFF = """
set -e
exec 2>&1
chmod -R u+rwX /testbed /tmp || true
find /tmp -mindepth 1 -maxdepth 1 -exec rm -rf {} +
mkdir /tmp/base
tar --extract --file=- --directory=/tmp/base
find /testbed -mindepth 2 -name .git -prune -exec rm -rf {} +
export GIT_DIR=/tmp/base/.git GIT_WORK_TREE=/testbed GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
export GIT_ATTR_NOSYSTEM=1 GIT_OPTIONAL_LOCKS=0
plain() { git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.attributesFile=/dev/null "$@"; }
plain add --all
plain diff --cached --binary --no-color --no-ext-diff --no-textconv --no-renames HEAD > /tmp/base/patch
"""


def save_base(workspace: Workspace) -> bytes:
    """The repository's data (`.git`) as a tar file; to be taken before the agent's first command.

    Raises:
        SandboxError: there is no repository in `/testbed`.
    """
    outcome = workspace.run(_SAVE)
    if outcome.exit_code != 0:
        raise SandboxError(f"expected a git repository in /testbed, got none: {outcome.notice or outcome.output:.500}")
    try:
        data = workspace.read("/tmp/.base.tar")
    except WorkspaceError as error:
        raise SandboxError(str(error)) from None
    workspace.run("rm /tmp/.base.tar")
    return data


def model_patch(workspace: Workspace, base: bytes, *, limits: Limits, most_bytes: int) -> str:
    """The agent's patch, as `git diff --binary` writes it; empties /tmp. It is to be the workspace's last use.

    Args:
        workspace: the agent's.
        base: what `save_base` returned.
        limits: of the commands that make the patch.
        most_bytes: the longest patch that is taken.

    Returns:
        The patch; bytes that are no UTF-8 are surrogate escapes, to be encoded as such.

    Raises:
        WorkspaceError: the agent left no work tree that git can compare, or changed more than that.
    """
    outcome = workspace.run(_DIFF, limits=replace(limits, output_bytes=4096), stdin=base)
    if outcome.exit_code != 0:
        raise WorkspaceError(f"no patch could be made: {outcome.notice or outcome.output:.500}")
    size = workspace.run("stat --printf=%s /tmp/base/patch", limits=limits)
    if not size.output.isdigit() or int(size.output) > most_bytes:
        raise WorkspaceError(f"expected a patch of at most {most_bytes} bytes, got {size.output:.20} bytes")
    return workspace.read("/tmp/base/patch").decode(errors="surrogateescape")
