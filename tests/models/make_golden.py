"""Writes golden/*.npz: logits of Hugging Face transformers (torch) for the small policies, beside their tokens.

    python tests/models/make_golden.py        (needs torch beside the package; run from the repository's root)

The weights come from a numpy seed (`small_policies.py`), so only tokens and logits are kept.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CASES = ("GROUPED_TIED", "MULTI_UNTIED", "ONE_KV_UNTIED", "POST_NORM", "GELU", "SLIDING")
ROWS, LENGTH = 2, 17


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    import small_policies
    import transformers_logits

    (HERE / "golden").mkdir(exist_ok=True)
    for seed, name in enumerate(CASES):
        config = getattr(small_policies, name)
        tokens = small_policies.numpy_tokens(config, (ROWS, LENGTH), seed)
        logits = transformers_logits.logits(config, small_policies.numpy_params(config, seed), tokens)
        np.savez_compressed(HERE / "golden" / f"{name.lower()}.npz", tokens=tokens, logits=logits)
        print(name, logits.shape, f"std {logits.std():.2f}")


if __name__ == "__main__":
    main()
