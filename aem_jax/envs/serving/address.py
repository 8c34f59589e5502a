"""Addresses of environment servers: as people write them, as clients connect to them, as servers print them."""

import ipaddress
import re
from urllib.parse import urlsplit

ALL_ADDRESSES = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Host that means all addresses of a machine -> the one to connect to from the machine itself."""
_SCHEMES = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}


def websocket_url(url: str) -> str:
    """The session endpoint of a server given as `host:port`, `http://…` or `ws://…`, with or without `/ws`.

    An IPv6 address stands in brackets, `[::1]:8765`. A path, a query and a user are kept.

    Raises:
        ValueError: another scheme, or none of these forms.
    """
    given = url.strip()
    with_scheme = given if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given) else f"ws://{given}"
    try:
        parts = urlsplit(with_scheme)
        if not parts.hostname or parts.scheme not in _SCHEMES or parts.fragment or re.search(r"\s", given):
            raise ValueError
        if parts.port is None and parts.netloc.endswith(":"):
            raise ValueError
    except ValueError:
        host = re.split("[/?#]", with_scheme.partition("://")[2])[0].rpartition("@")[2]
        bare = host.count(":") > 1 and "[" not in host
        hint = "; an IPv6 address stands in brackets, as in [::1]:8765" if bare else ""
        raise ValueError(
            f"expected an environment server as host:port, http://… or ws://…, got {without_password(url)!r}{hint}"
        ) from None
    path = parts.path.rstrip("/")
    path = path if path.endswith("/ws") else f"{path}/ws"
    return f"{_SCHEMES[parts.scheme]}://{parts.netloc}{path}{'?' if parts.query else ''}{parts.query}"


def without_password(url: str) -> str:
    """The address for messages: what stands before an @ may be a password."""
    return re.sub(r"(^|//)[^/?#]*@", r"\1…@", url)


def keeps_secrets(url: str) -> bool:
    """Whether a token may be sent there: encrypted, or not over a network."""
    parts = urlsplit(websocket_url(url))
    if parts.scheme == "wss" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:  # a name
        return False


def connectable(host: str, port: int) -> str:
    """`host:port` to connect to, on this machine, for a server that listens on `host`."""
    host = host.strip("[]")
    host = ALL_ADDRESSES.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
