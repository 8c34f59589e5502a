"""`{command-output}`: what one of the package's own commands prints, so that a page cannot fall behind it."""

import os
import re
import shlex
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class CommandOutput(SphinxDirective):
    """Runs `python -m aem_jax.launch ARGUMENTS` and shows what it prints."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The output as one block of text."""
        command = [sys.executable, "-m", "aem_jax.launch", *shlex.split(self.arguments[0])]
        settings = {"COLUMNS": "110", "JAX_PLATFORMS": "cpu", "NO_COLOR": "1", "PYTHONUTF8": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
        if result.returncode:
            raise self.error(f"{shlex.join(command)} failed: {result.stderr[-500:]}")
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-output", CommandOutput)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
