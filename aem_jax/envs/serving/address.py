"""Addresses of environment servers, in the forms that users write, clients use, and servers print; tokens for them."""

import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

ALL_ADDRESSES = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Host that stands for all addresses of a machine -> host to connect to from the same machine."""
_SCHEMES = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}


def websocket_url(url: str) -> str:
    """Returns the session endpoint of a server given as `host:port`, `http://…` or `ws://…`, with or without `/ws`.

    An IPv6 address must be in brackets: `[::1]:8765`. A path, a query and a user are kept.

    Raises:
        ValueError: the scheme is unknown, or the address has none of these forms.
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
    """Returns the address without the part before an @, which may contain a password. For messages."""
    return re.sub(r"(^|//)[^/?#]*@", r"\1…@", url)


def keeps_secrets(url: str) -> bool:
    """Whether a token may be sent to this address: the connection is encrypted, or stays on this machine."""
    parts = urlsplit(websocket_url(url))
    if parts.scheme == "wss" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:  # a host name
        return False


def bearer(variable: str) -> Mapping[str, str]:
    """Returns headers with the token in an environment variable, for hosted servers; none if `variable` is empty.

    Raises:
        ValueError: the name cannot be the name of a variable, or the variable contains no token.
    """
    if not variable:
        return {}
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):  # not shown: it may be the token itself
        raise ValueError("expected the name of an environment variable (capitals, digits, _) with a token, got another")
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        what = "something else" if token else "nothing"
        raise ValueError(f"expected a token in the environment variable {variable}, found {what}; export {variable}=…")
    return {"Authorization": f"Bearer {token}"}


def connectable(host: str, port: int) -> str:
    """Returns the `host:port` for connections from this machine to a server that listens on `host`."""
    host = host.strip("[]")
    host = ALL_ADDRESSES.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
