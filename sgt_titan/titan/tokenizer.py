"""No tokenizer: torchtitan's trainer builds one, and nothing here asks it anything.

Rows are tokenized by ``data/`` beforehand. torchtitan's own would compile the trunk's chat template with a compiler
that knows less than transformers' (``{% generation %}``, lists of templates) and end the run over a template that is
not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer


class NoTokenizer(BaseTokenizer):
    """Answers nothing."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config | None = None, *, tokenizer_path: str = ""):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError
