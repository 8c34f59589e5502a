"""`python -m aem_jax.launch`: see `cli.py`."""

import io
import os
import signal
import sys


def _quit(number: int, frame: object) -> None:
    """Ends the process at once: an exception in the middle of an import may be printed, or swallowed."""
    os._exit(128 + number)


# First of all: imports take seconds. Phases that have something to finish or to take away handle Ctrl-C themselves.
signal.signal(signal.SIGINT, _quit)

# Before anything loads XLA or tokenizers: their chatter would drown what we say.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A closed descriptor (`>&-`) would become that of the next file that is opened, and receive what is printed.
for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115

# Printing never ends a run: what an output cannot encode (ASCII, Latin-1) is written as its escape.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

from aem_jax.launch.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
