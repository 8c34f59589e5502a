"""The Python examples of the README run unchanged, each in its own process, as if pasted by a reader."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_examples():
    assert EXAMPLES, "expected at least one ```python block in README.md"


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example(example: str, user_environment: dict[str, str]):
    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=REPOSITORY, env=user_environment
    )
    assert result.returncode == 0, f"{example}\n{result.stderr}"
