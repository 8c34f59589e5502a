"""Addresses of servers: as written by users, as connected to, as allowed to get a token, as printed by a server."""

import pytest

from aem_jax.envs.serving.address import connectable, keeps_secrets, websocket_url, without_password


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("localhost:8765", "ws://localhost:8765/ws"),
        ("h", "ws://h/ws"),
        ("http://h:1/", "ws://h:1/ws"),
        ("https://h", "wss://h/ws"),
        ("ws://h:1/ws", "ws://h:1/ws"),
        ("wss://h/env/ws/", "wss://h/env/ws"),
        ("HTTPS://H//", "wss://H/ws"),
        (" ws://h:1 ", "ws://h:1/ws"),
        ("[::1]:8000", "ws://[::1]:8000/ws"),
        ("ws://[fe80::1%eth0]:8000/p", "ws://[fe80::1%eth0]:8000/p/ws"),
        ("http://[::1]", "ws://[::1]/ws"),
        ("ws://host/p?x=1", "ws://host/p/ws?x=1"),
        ("ws://host/ws?x=/ws&y=2", "ws://host/ws?x=/ws&y=2"),
        ("host:1?next=http://x", "ws://host:1/ws?next=http://x"),
        ("ws://user:pass@h:1/p", "ws://user:pass@h:1/p/ws"),
    ],
)
def test_addresses(url, full):
    assert websocket_url(url) == full == websocket_url(full)


@pytest.mark.parametrize(
    "url",
    [
        *("", "ftp://h", "://h", "ws://", "/ws", "http:/h", "h:", "h:abc", "h:99999", "ws://h#part", "ws://h 1"),
        *("::1", "::1:8000", "[::1", "ws://[::zz]:1"),
    ],
)
def test_invalid_addresses_are_refused(url):
    with pytest.raises(ValueError, match="expected an environment server as host:port, http://… or ws://…, got") as why:
        websocket_url(url)
    assert ("in brackets, as in [::1]:8765" in str(why.value)) == url.startswith("::1")


def test_passwords_are_not_shown():
    assert without_password("ws://user:secret@h:1/p?x=a@b") == "ws://…@h:1/p?x=a@b"
    with pytest.raises(ValueError) as error:
        websocket_url("user:secret@h:x")
    assert "secret" not in str(error.value)


def test_a_token_needs_an_encrypted_connection_or_this_machine():
    assert all(map(keeps_secrets, ("localhost:1", "ws://127.0.0.1:1", "[::1]:2", "HTTPS://h", "wss://h:1/p")))
    for url in ("h:1", "ws://127.0.0.1.evil.org", "ws://localhost:x@evil.org", "http://[::2]"):
        assert not keeps_secrets(url)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8"),
        ("h", "h:8"),
        ("::1", "[::1]:8"),
        ("[::1]", "[::1]:8"),
        ("::", "[::1]:8"),
        ("0.0.0.0", "127.0.0.1:8"),
        ("", "127.0.0.1:8"),
    ],
)
def test_what_a_server_prints_can_be_connected_to(host, address):
    assert connectable(host, 8) == address and websocket_url(address) == f"ws://{address}/ws"
