"""Servers for the tests in this folder."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

from websockets.sync.server import serve

REPOSITORY = Path(__file__).resolve().parents[2]


def command(name, *options, settings=None):
    return [
        sys.executable,
        "-m",
        "aem_jax.envs.serving.server",
        name,
        "--settings",
        json.dumps(settings or {}),
        *options,
    ]


@contextlib.contextmanager
def served(name, *options, settings=None, port=0):
    """A server process; yields `host:port` and the process."""
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
    """Runs a server process that is expected to end by itself; returns its exit status and stderr."""
    done = subprocess.run(
        command(name, *options, settings=settings), capture_output=True, cwd=REPOSITORY, text=True, timeout=60
    )
    return done.returncode, done.stderr


@contextlib.contextmanager
def foreign_server(reply, token=""):
    """A server with custom messages; `reply` makes the raw answer to a message. It may require a token."""

    def admit(connection, request):
        if token and request.headers.get("Authorization") != f"Bearer {token}":
            return connection.respond(401, "a token is needed")
        return None

    def handler(connection):
        for raw in connection:
            answer = reply(json.loads(raw))
            if answer is not None:
                connection.send(answer)

    with serve(handler, "127.0.0.1", 0, process_request=admit) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
