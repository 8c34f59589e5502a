"""Records an exchange with an OpenEnv server. `test_openenv_recorded` replays it without OpenEnv.

    python tests/envs/record_openenv.py ws://127.0.0.1:8000 FILE --server "echo_env, openenv-core 0.3.0" \
        --field-mapping '{"action_field": "message", …}' --task '{"seed": 1}' --say hello --say "[7]"

The first line of FILE describes the recording; each further line is a message and its answer, exactly as sent. The
messages are: the state (a pool's first message), a reset, the steps, an unknown step, the state again, and the end.
"""

import argparse
import json
import sys
from pathlib import Path

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from aem_jax.envs import protocol
from aem_jax.envs.serving.address import websocket_url
from aem_jax.envs.serving.field_mapping import FieldMapping, encode_reset, step_encoder

UNKNOWN_STEP = json.dumps({"type": "step", "data": {"no such field": "x"}})


def requests(mapping: FieldMapping, task: dict, say: list[str]) -> list[str]:
    """The requests, in order."""
    steps = [*map(step_encoder(mapping), say), UNKNOWN_STEP]
    return [protocol.STATE_REQUEST, encode_reset(task), *steps, protocol.STATE_REQUEST, protocol.CLOSE_REQUEST]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--server", required=True)
    parser.add_argument("--field-mapping", type=json.loads, default={})
    parser.add_argument("--task", type=json.loads, default={})
    parser.add_argument("--say", action="append", default=[])
    options = parser.parse_args()
    lines = [{name: getattr(options, name) for name in ("server", "field_mapping", "task", "say")}]
    with connect(websocket_url(options.url), proxy=None, open_timeout=60) as socket:
        for request in requests(FieldMapping(**options.field_mapping), options.task, options.say):
            socket.send(request)
            try:
                lines.append({"sent": request, "received": str(socket.recv(timeout=60))})
            except ConnectionClosed:
                lines.append({"sent": request, "received": None})
    options.file.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
