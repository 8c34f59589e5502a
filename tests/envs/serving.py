"""Server processes for the tests of this folder."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def command(name, *options, settings=None):
    return [sys.executable, "-m", "aem_jax.envs.server", name, "--settings", json.dumps(settings or {}), *options]


@contextlib.contextmanager
def served(name, *options, settings=None, port=0):
    """A server process; gives `host:port` and the process."""
    arguments = command(name, "--port", str(port), *options, settings=settings)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True)
    try:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield f"127.0.0.1:{json.loads(line)['port']}", process
    finally:
        process.kill()
        process.communicate()


def run_server(name, *options, settings=None):
    """A server process that is expected to end by itself; gives exit status and stderr."""
    done = subprocess.run(
        command(name, *options, settings=settings), capture_output=True, cwd=REPOSITORY, text=True, timeout=60
    )
    return done.returncode, done.stderr
