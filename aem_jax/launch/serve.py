"""`serve ENVIRONMENT`: one environment server, started by hand; runs reach it with `--env.urls ws://host:port`."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from aem_jax.envs.server import ServerConfig, serve
from aem_jax.envs.table import ENVIRONMENTS, settings_from_json
from aem_jax.launch.overrides import ConfigError, nearest


@dataclass(frozen=True)
class ServeConfig(ServerConfig):
    """Where and how to serve, and what."""

    settings: str = "{}"
    """The environment's own settings as a JSON mapping."""


def run(names: Sequence[str], config: ServeConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status.

    Raises:
        ConfigError: an unknown environment, bad settings, or a port that cannot be had.
    """
    known = ", ".join(ENVIRONMENTS)
    if len(names) != 1:
        raise ConfigError(f"expected one environment to serve, of {known}, got {len(names)}")
    if names[0] not in ENVIRONMENTS:
        raise ConfigError(
            f"unknown environment {names[0]!r}{nearest(names[0], ENVIRONMENTS) or '; known are ' + known}"
        )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    server = ServerConfig(**{each.name: getattr(config, each.name) for each in dataclasses.fields(ServerConfig)})
    try:
        serve(
            names[0], settings_from_json(config.settings), server, lambda port: _announce(names[0], server.host, port)
        )
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    return 0


def _announce(name: str, host: str, port: int) -> None:
    print(
        f"serving {name} on ws://{host}:{port}/ws (Ctrl-C to stop); use it with --env.urls ws://{host}:{port}",
        flush=True,
    )
