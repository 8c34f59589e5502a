"""`{settings}`: the settings of a run, made from the configs: a section with a definition list for each group.

`{settings} run` has the groups of every run, `{settings} environments` those of one environment each.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from aem_jax.config.run import RunConfig
from aem_jax.envs.registry import TRAINED
from aem_jax.help import Group, Setting, describe_type, describe_value, setting_groups
from aem_jax.overrides import choose, flag


def run_groups() -> list[Group]:
    """The groups of every run."""
    keys = [name.replace("-", "_") for name in TRAINED]
    return [group for group in setting_groups(RunConfig()) if group.name.partition(".")[0] not in keys]


def environment_groups() -> list[Group]:
    """The groups of every environment."""
    common = [group.name for group in run_groups()]
    configs = [choose(RunConfig(), {"environment": name}) for name in TRAINED]
    return [group for config in configs for group in setting_groups(config) if group.name not in common]


def definitions(group: Group) -> str:
    """A group's settings as a Markdown definition list."""
    return "\n\n".join(map(_definition, group.settings))


def _definition(setting: Setting) -> str:
    default = describe_value(setting.default)
    term = f"`{flag(setting.name)} {describe_type(setting.kind)}`, default {f'`{default}`' if default else 'empty'}"
    meaning = re.sub(r"([<*$])", r"\\\1", " ".join(setting.text.split()))
    return f"{term}\n: {meaning}"


class Settings(SphinxDirective):
    """A section for each group of settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The sections."""
        sections = []
        for group in {"run": run_groups, "environments": environment_groups}[self.arguments[0]]():
            title = group.name or "run"
            section = nodes.section(ids=[nodes.make_id(f"settings-{title}")], names=[title])
            section += nodes.title(title, title)
            section += self.parse_text_to_nodes(f"{group.text}\n\n{definitions(group)}\n")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("settings", Settings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
