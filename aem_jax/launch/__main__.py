"""`python -m aem_jax.launch`: see `cli.py`."""

import io
import os
import sys

# Before anything loads XLA or tokenizers: their chatter would drown what we say.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Printing never ends a run: what an output cannot encode (ASCII, Latin-1) is written as its escape.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

from aem_jax.launch.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
