"""The benchmarks of `accelerator.sh`. One process runs many, because starting a process takes longer than most of them.

    python -m benchmarks.accelerator decode|learner|trace

Each run of `bench` prints its JSON line when it finishes. A failed run prints a line with its error, and the next run
starts. TINY=1 in the environment selects sizes that a CPU can run.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from aem_jax.launch.cli import main as launch

TINY = os.environ.get("TINY", "") not in ("", "0")
SMALL, LARGE = ("tiny", "tiny") if TINY else ("qwen2.5-0.5b", "qwen2.5-1.5b")
SLOTS = (2, 4) if TINY else (64, 16, 128)
CONTEXTS = (16, 32) if TINY else (1024, 256)
NEW_TOKENS = 4 if TINY else 64
ROWS, ROW_LENGTH = (2, 64) if TINY else (4, 2048)
REPEATS = 2 if TINY else 3


class Run(NamedTuple):
    """One call of `bench`; `words` are the arguments of its command line."""

    words: tuple[str, ...]


def decode_runs() -> list[Run]:
    """Returns the runs, the most valuable first, because the time limit may cut off the last ones.

    The first is the one with a goal: a 1.5B model, 128 slots, 1,024 tokens of context. It is followed by the same with
    XLA's attention.
    """
    runs = [_decode(LARGE, max(SLOTS), max(CONTEXTS), attention) for attention in ("auto", "xla")]
    runs += [_decode(SMALL, slots, context) for context in CONTEXTS for slots in SLOTS]
    runs += [_decode(LARGE, slots, context) for context in CONTEXTS for slots in SLOTS]
    return list(dict.fromkeys(runs))


def _decode(model: str, slots: int, context: int, attention: str = "auto") -> Run:
    sizes = {"--model": model, "--slots": slots, "--prompt-tokens": context, "--new-tokens": NEW_TOKENS}
    return Run(("bench", "sampler", *_words(sizes), "--sampling.attention", attention))


def learner_runs() -> list[Run]:
    """Returns the runs in the same order of value."""
    ways = [("cudnn", "layers"), ("xla", "layers"), ("cudnn", "none"), ("xla", "none")]
    runs = [_learn(LARGE, *ways[0]), *(_learn(SMALL, *way) for way in ways), *(_learn(LARGE, *way) for way in ways[1:])]
    return list(dict.fromkeys(runs))


def _learn(model: str, attention: str, remat: str) -> Run:
    sizes = {"--model": model, "--slots": ROWS, "--row-length": ROW_LENGTH}
    return Run(
        ("bench", "learner", *_words(sizes), "--learner.attention", attention, "--learner.remat", remat),
    )


def trace_runs() -> list[Run]:
    """Returns one decode and one update with a profile, whose longest operations are printed to standard error."""
    folder = ("--trace", tempfile.mkdtemp(prefix="trace-"))
    decode, learn = _decode(LARGE, max(SLOTS), max(CONTEXTS)), _learn(SMALL, "auto", "layers")
    return [run._replace(words=(*run.words, *folder)) for run in (decode, learn)]


def _words(sizes: dict[str, object]) -> list[str]:
    return [str(word) for pair in {**sizes, "--repeats": REPEATS}.items() for word in pair]


PARTS = {"decode": decode_runs, "learner": learner_runs, "trace": trace_runs}


def run_all(runs: Sequence[Run]) -> int:
    """Executes the runs in order; returns the number of failures."""
    failed = 0
    for run in runs:
        gc.collect()  # frees the arrays of the previous run
        start, error = time.perf_counter(), ""
        print(f"== {' '.join(run.words)}", file=sys.stderr, flush=True)
        try:
            status = launch(run.words)
            error = f"exit status {status}" if status else ""
        except Exception as failure:
            error = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        line = {"kind": "run", "words": run.words, "error": error}
        print(json.dumps({**line, "seconds": time.perf_counter() - start}), flush=True)
        failed += bool(error)
        if error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
    return failed


def main(words: Sequence[str]) -> int:
    """Runs one part; returns 0 if at least one of its runs succeeded, 2 for an unknown part."""
    if len(words) != 1 or words[0] not in PARTS:
        print(f"error: expected one of {', '.join(PARTS)}, got {' '.join(words) or 'nothing'}", file=sys.stderr)
        return 2
    runs = PARTS[words[0]]()
    return int(run_all(runs) == len(runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
