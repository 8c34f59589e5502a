"""`import aem_jax.advantage` is for other trainers and must load only jax."""

import subprocess
import sys

FRESH = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import aem_jax.advantage
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(roots - {"aem_jax"} - set(sys.stdlib_module_names)))
print(sorted({"flax", "transformers", "orbax", "grain", "optax"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_import_loads_jax_alone():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
