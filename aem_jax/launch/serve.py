"""`serve ENVIRONMENT`: one environment server, started by hand; runs reach it with `--env.urls ws://host:port`.

`--html` serves a web site instead, for a person in a browser.
"""

import dataclasses
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.registry import SERVED, environment_spec
from aem_jax.envs.serving.address import ALL_ADDRESSES, connectable
from aem_jax.envs.serving.server import ServerConfig, serve
from aem_jax.errors import ConfigError
from aem_jax.files import parse_mapping
from aem_jax.overrides import nearest


@dataclass(frozen=True)
class ServeConfig(ServerConfig):
    """Where and how to serve, and what."""

    settings: str = "{}"
    """The environment's own settings as a JSON mapping."""
    html: bool = False
    """Serve a web site instead, on which a person does what an agent would: webshop has one."""


def run(names: Sequence[str], config: ServeConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status.

    Raises:
        ConfigError: an unknown environment, bad settings, or a port that cannot be had.
    """
    known = f"{', '.join(SERVED)}; or your own as file.py:attribute"
    if len(names) != 1:
        raise ConfigError(f"expected one environment to serve, of {known}, got {len(names)}")
    if names[0] not in SERVED and ":" not in names[0]:
        raise ConfigError(f"unknown environment {names[0]!r}{nearest(names[0], SERVED) or '; known are ' + known}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    server = ServerConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ServerConfig)})
    try:
        settings = parse_mapping(config.settings, "settings")
        if config.html:
            _serve_site(names[0], settings, server)
        else:
            serve(names[0], settings, server, lambda port: _announce(names[0], server.host, port))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:  # while it was starting; later Ctrl-C ends it in order
        return 128 + signal.SIGINT
    return 0


def _serve_site(name: str, settings: Mapping[str, Any], server: ServerConfig) -> None:
    import uvicorn

    spec = environment_spec(name)
    if spec.site is None:
        known = [served for served in SERVED if environment_spec(served).site]
        raise ValueError(f"--html: expected an environment with a web site, of {', '.join(known)}, got {name}")
    site, host = spec.site(spec.configured(settings)), server.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, server.port), family=family) as listening:
        address = connectable(host, listening.getsockname()[1])
        print(f"serving {name} as a web site on http://{address}/ (Ctrl-C to stop)", flush=True)
        uvicorn.Server(uvicorn.Config(site, log_level="warning")).run(sockets=[listening])


def _announce(name: str, host: str, port: int) -> None:
    url = f"ws://{connectable(host, port)}"
    where = "all addresses of this machine; " if host.strip("[]") in ALL_ADDRESSES else ""
    print(f"serving {name} on {url}/ws ({where}Ctrl-C to stop); use it with --env.urls {url}", flush=True)
