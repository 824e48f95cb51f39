"""The one way to a tokenizer, for training, export, client and evaluation: the ids are those of tokenizer.json.

transformers chooses a class by ``tokenizer_class`` and ``model_type``, and some classes build a pre-tokenizer of their
own: a trunk and its export differ in ``model_type``, and so could differ in ids. Here the class is always the generic
one, and what it makes of a probe is held to what the ``tokenizers`` library reads from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgt_titan.errors import UserError
from sgt_titan.trunk.files import read_json
from sgt_titan.trunk.tokenizer_files import TOKENIZER_FILES, require_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sgt_titan.transform.configuration import SGTConfig

# Scripts, digits, white space, punctuation, case, joined emoji, text that looks like code: where tokenizers differ.
PROBE = (
    "It's 4111 1111 or 3.14, 1,000,000 and 007; call +1 (415) 555-0100 at 12:30.\n\n"
    " leading  two   three\tspaces\r\n\ttabs \u00a0no-break\u2003em\u3000wide\n \n"
    "I'll DON'T we've HELLO hello Hello camelCase snake_case __init__ x=y+1; // {a: [1, 2]} <tag/> #!?\"'`~^|\\\n"
    "Ärger naïve Ωmega straße ﬁ İstanbul e\u0301 Привет, мир 42 Ґанок ελληνικά ქართული Հայերեն\n"
    "שלום 12 مرحبا ١٢٣ فارسی हिन्दी १२३ தமிழ் বাংলা ไทย ລາວ မြန်မာ አማርኛ བོད\n"
    "你好，世界３ 日本語 カタカナ ｶﾀｶﾅ 한국어 ㄱㄴ 𠮷 𝔘𝔫𝔦 👩‍👩‍👧‍👦 🇺🇳 ❤️ ½ ² ™ € \u200b\u00ad end "
)


def load_tokenizer(directory: str | Path, said: str = "trunk.path") -> Any:
    """The fast tokenizer of a directory, without touching the network or running its code.

    Raises:
        UserError: no directory, no tokenizer.json in it, one that cannot be read, or settings beside it
            (tokenizer_config.json) that change what it does.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{said}: {path} is not a directory; it must hold tokenizer.json and config.json")
    file = require_tokenizer(path)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # else it warns that the class is not the one that tokenizer_config.json names
    try:
        raw = Tokenizer.from_file(str(file))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: no readable tokenizer (tokenizer.json, tokenizer_config.json): {reason}") from error
    finally:
        logging.set_verbosity(level)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(path / "chat_template.json")
    _check_like_file(tokenizer, raw, path)
    return tokenizer


def _processor_template(file: Path) -> str | None:
    """The template of a checkpoint that has it for a processor: the tokenizer's class does not look there."""
    if not file.is_file():
        return None
    found = read_json(file).get("chat_template")
    if not isinstance(found, str):
        raise UserError(f"{file}: must hold a text under chat_template")
    return found


def tokenizer_folder(name: str | Path, **where: Any) -> Path:
    """A directory as it is; of a hub name the directory in which the tokenizer's files are, fetched if need be.

    Args:
        where: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` of ``huggingface_hub.snapshot_download``.

    Raises:
        OSError, ValueError: the hub does not deliver it.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=[*TOKENIZER_FILES], **where))


def _check_like_file(tokenizer: Any, raw: Any, path: Path) -> None:
    raw.no_truncation()
    raw.no_padding()
    probe = PROBE + " ".join(f"a{token.content}b" for token in raw.get_added_tokens_decoder().values())
    if (
        tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        != raw.encode(probe, add_special_tokens=False).ids
    ):
        raise UserError(
            f"{path}: tokenizer_config.json changes the ids that tokenizer.json gives (added_tokens_decoder, "
            "split_special_tokens?); remove what it changes, or save the tokenizer again"
        )
    known = tokenizer.get_vocab()
    for number, token in raw.get_added_tokens_decoder().items():
        if known.get(token.content) != number:
            raise UserError(
                f"{path}: {token.content!r} is {number} in tokenizer.json and {known.get(token.content)} in "
                "tokenizer_config.json; save the tokenizer again"
            )


def fingerprint_ids(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what a tokenizer does: ids of the probe and of every added token within text, BOS and EOS."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    added = sorted((number, token.content) for number, token in tokenizer.added_tokens_decoder.items())
    does = {
        "probe": ids(PROBE),
        "added": [(number, content, ids(f"a{content} b")) for number, content in added],
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "size": len(tokenizer),
    }
    return hashlib.sha256(json.dumps(does, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    """The text of one sequence of ids; transformers' own ``decode`` may also mean several."""
    return str(tokenizer.decode(list(ids), **options))


def check_ids_fingerprint(tokenizer: PreTrainedTokenizerBase, config: SGTConfig, directory: str | Path) -> None:
    """Raise UserError if the tokenizer gives other ids than training saw; earlier exports carry no fingerprint."""
    wanted = config.fingerprints.get("ids")
    if wanted is not None and wanted != fingerprint_ids(tokenizer):
        raise UserError(
            f"{directory}: the tokenizer gives other ids than the one the transform was trained with "
            "(fingerprints.ids): another tokenizer.json, or another version of the tokenizers library"
        )
