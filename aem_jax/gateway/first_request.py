"""The first request of OpenAI's clients, made before agents are forked. Only the standard library is imported here."""

import asyncio
import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

_WARM_UP_S = 5.0


class _CannedResponses(BaseHTTPRequestHandler):
    """Answers each request with an empty response."""

    def do_POST(self) -> None:
        """Reads a request and answers it."""
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        head = {"id": "", "object": "chat.completion", "created": 0, "model": ""}
        body = json.dumps({**head, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


def make_first_request() -> None:
    """Makes a request with each of OpenAI's clients, if the agent imported them, to a server in a thread. The first
    request of a process imports modules and builds validators (three quarters of the CPU time of an episode of five
    requests): here once, else in each episode's process. It goes through a socket, so that the transport is included,
    whichever package it comes from."""
    openai = sys.modules.get("openai")
    if openai is None:
        return
    with contextlib.suppress(Exception), HTTPServer(("127.0.0.1", 0), _CannedResponses) as server:
        server.timeout = _WARM_UP_S
        thread = threading.Thread(target=lambda: [server.handle_request() for _ in range(2)])
        thread.start()
        where = {"base_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "api_key": "-", "max_retries": 0}
        ask = {"model": "", "messages": [{"role": "user", "content": ""}]}
        try:
            with openai.OpenAI(**where, timeout=_WARM_UP_S) as client:
                client.chat.completions.create(**ask)

            async def first() -> None:
                async with openai.AsyncOpenAI(**where, timeout=_WARM_UP_S) as client:
                    await client.chat.completions.create(**ask)

            asyncio.run(first())
        finally:
            thread.join()  # a process with threads must not be forked
