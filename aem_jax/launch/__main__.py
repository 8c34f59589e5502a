"""`python -m aem_jax.launch`: see `cli.py`."""

import io
import os
import signal
import sys


def _quit(number: int, frame: object) -> None:
    """Ends the process at once, because an import may print or swallow an exception."""
    os._exit(128 + number)


# First, because imports take seconds. Phases with work to finish or to undo handle Ctrl-C themselves.
signal.signal(signal.SIGINT, _quit)

# Before anything loads XLA or tokenizers, whose logs would hide those of this package.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The next file to be opened would get the number of a closed descriptor (`>&-`), and receive what is printed.
for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115

# Printing never ends a run: characters that an output cannot encode (ASCII, Latin-1) are escaped.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

from aem_jax.launch.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
