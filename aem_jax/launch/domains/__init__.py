"""What can be learnt: environments by name, as runs see them."""

from collections.abc import Callable, Mapping

from aem_jax.config.run import RunConfig
from aem_jax.launch.domains.alfworld import alfworld
from aem_jax.launch.domains.domain import Domain, texts
from aem_jax.launch.domains.openenv import openenv
from aem_jax.launch.domains.swe import swe, swe_choices
from aem_jax.launch.domains.webshop import webshop

DOMAINS: Mapping[str, Callable[[RunConfig], Domain]] = {
    "alfworld": alfworld,
    "webshop": webshop,
    "swe": swe,
    "swe-choices": swe_choices,
    "openenv": openenv,
}
"""Name of `RunConfig.environment` -> the environment as a run sees it."""

__all__ = ["DOMAINS", "Domain", "texts"]
