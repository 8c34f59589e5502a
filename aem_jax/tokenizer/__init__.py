"""Text and ids, and chat turns as id deltas. Only this room imports transformers and tokenizers.

It imports them when they are needed, because their import is slow.
"""

from aem_jax.tokenizer.chat_template import CHATML
from aem_jax.tokenizer.chat_tokenizer import ChatTokenizer, TokenizerConfig

__all__ = ["CHATML", "ChatTokenizer", "TokenizerConfig"]
