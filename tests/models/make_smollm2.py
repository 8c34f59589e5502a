"""Writes golden/smollm2.json: ids, logits and greedy words of SmolLM2 as transformers (torch) reads its GGUF file.

    make smollm2 && python tests/models/make_smollm2.py     (needs torch, accelerate and gguf; from the root)

Transformers does not know the pre-tokenizer `smollm` and takes GPT-2's, which gives other ids for spaces before digits.
So the pre-tokenizer here is that of the model's own tokenizer.json: single digits, then GPT-2's.
"""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "models" / "smollm2-135m"
TEXTS = [
    "Hello world, it's a test; I'LL go.",
    "1234567890  999 and 3.14159, ²³½ ٣٤ Ⅷ １２３",
    "naïve café ﬁ e\u0301 中文字 مرحبا 🙂👍🏽\u200d \ufeff",
    "def f(x):\n\treturn x**2  # why\n\n\n    pass\r\n",
    " \n\t leading, and trailing \n ",
    "<think>\nThe mug may be in cabinet 12.\n</think>\n<action>go to cabinet 12</action>",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are in a room. Answer with one action."},
        {"role": "user", "content": "You see a drawer 2, a drawer 1, and a sofa 1. Task: put a pillow in sofa."},
        {"role": "assistant", "content": "<action>go to sofa 1</action>"},
        {"role": "user", "content": "You arrive at sofa 1. On it, you see a pillow 3."},
    ],
]
WORDS, LOGITS = 10, 16


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, gguf_file="model.gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, gguf_file="model.gguf", dtype=torch.float32).eval()
    chats = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = []
        with torch.no_grad():  # not `generate`, which takes <|im_end|> in a prompt for padding
            for _ in range(WORDS):
                words = [int(row.argmax()) for row in rows]
                rows.append(model(torch.tensor([ids + words])).logits[0, -1].double())
        best = rows[0].topk(LOGITS)
        chats.append(
            {
                "messages": messages,
                "ids": ids,
                "best": best.indices.tolist(),
                "logits": [round(value, 5) for value in best.values.tolist()],
                "mean": round(rows[0].mean().item(), 5),
                "greedy": [int(row.argmax()) for row in rows],
            }
        )
        print(tokenizer.decode(chats[-1]["greedy"]))
    texts = [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS]
    golden = {"texts": texts, "chats": chats}
    (HERE / "golden" / "smollm2.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
