"""Roles of tokens against references that know nothing of offsets: characters, and bytes of byte-level tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import (
    PROMPT,
    RESPONSE,
    TEMPLATE,
    _owners,
    encode_turns,
    obfuscation_mask,
    response_start,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (  # Llama 2: the system turn is folded into the first user turn, everything is trimmed
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if m.role == 'user' %}"
    "{% set text = (system + m.content) if loop.index0 == 0 else m.content %}"
    "<s>[INST] {{ text.strip() }} [/INST]{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = "user assistant system the cat sat on the mat, 12 dollars. hello world\n\n  two  spaces été Straße 猫 🙂 user\n"


def wrap(core: Tokenizer, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """GPT-2's kind, with the offset trimming that makes tokens of spaces look empty."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    return wrap(core, template)


def character_level(template: str) -> PreTrainedTokenizerFast:
    """One token a character, so that roles can be written down."""
    characters = sorted(set(TEXT + template + "[]/<>_SYINT" + "abcdefghijklmnopqrstuvwxyz "))
    vocabulary = {c: i for i, c in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return wrap(core, template)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def spelled(tokenizer, encoded) -> list[tuple[str, int]]:
    return list(zip(tokenizer.convert_ids_to_tokens(encoded.ids), encoded.roles, strict=True))


def labelled(*parts: tuple[str, int]) -> list[tuple[str, int]]:
    """Special tokens are one token, everything else one a character."""
    return [(t, role) for text, role in parts for t in ([text] if text in SPECIAL else text)]


def test_chat_roles_spelled_out():
    tokenizer = character_level(CHATML)
    # "user" and "a" occur in the template's own words: a search for contents would find them there.
    messages = [turn("system", "user"), turn("user", "a"), turn("assistant", "s"), turn("user", "user"),
                turn("assistant", "a cat")]  # fmt: skip
    head = lambda role: [("<|im_start|>", TEMPLATE), (role + "\n", TEMPLATE)]  # noqa: E731
    stop = [("<|im_end|>", TEMPLATE), ("\n", TEMPLATE)]
    expected = labelled(
        *head("system"), ("user", PROMPT), *stop, *head("user"), ("a", PROMPT), *stop,
        *head("assistant"), ("s", PROMPT), *stop, *head("user"), ("user", PROMPT), *stop,
        *head("assistant"), ("a cat", RESPONSE), ("<|im_end|>", RESPONSE), ("\n", TEMPLATE),
    )  # fmt: skip
    assert spelled(tokenizer, encode_turns(tokenizer, messages, template="chat")) == expected


def test_trimmed_and_folded_turns():
    tokenizer = character_level(TRIMMING)
    messages = [turn("system", " s "), turn("user", "\nuser "), turn("assistant", " cat\n")]
    expected = labelled(
        ("<s>", TEMPLATE), ("[INST] <<SYS>>\n", TEMPLATE), (" s ", PROMPT), ("\n<</SYS>>\n\n", TEMPLATE),
        ("\nuser", PROMPT), (" [/INST]", TEMPLATE), (" cat ", RESPONSE), ("</s>", RESPONSE),
    )  # fmt: skip
    assert spelled(tokenizer, encode_turns(tokenizer, messages, template="chat")) == expected


def test_inference_is_a_prefix_of_training():
    tokenizer = byte_level()
    prompt = [
        turn("system", "be user"),
        turn("user", "the cat, 12 dollars"),
        turn("assistant", "hello"),
        turn("user", "?"),
    ]
    training = encode_turns(tokenizer, [*prompt, turn("assistant", "hello world")], template="chat")
    inference = encode_turns(tokenizer, prompt, template="chat", add_generation_prompt=True)
    n = len(inference.ids)
    assert training.ids[:n] == inference.ids
    assert training.roles[:n] == inference.roles
    assert RESPONSE not in inference.roles
    assert response_start(training.roles) == n


def test_assistant_turn_before_generation_prompt_is_prompt():
    tokenizer = byte_level()
    encoded = encode_turns(tokenizer, [turn("assistant", "hi")], template="chat", add_generation_prompt=True)
    assert RESPONSE not in encoded.roles and PROMPT in encoded.roles


def test_roles_match_byte_coverage():
    """Byte-level tokens spell their bytes, which gives their extent without offsets."""
    rng = random.Random(0)
    tokenizer = byte_level()
    to_byte = _byte_of_character()
    pieces = ["user", " ", "  ", "\n", "12", "été", "猫", "🙂", "a", "hello world", "<|im_end|>", "the cat", "\n\n   "]
    for _ in range(300):
        messages = [turn(role, "".join(rng.choices(pieces, k=rng.randint(0, 5)))) for role in
                    ("system", "user", "assistant", "user", "assistant")[rng.randint(0, 2) :]]  # fmt: skip
        encoded = encode_turns(tokenizer, messages, template="chat")
        text, spans = b"", []
        for m in messages:
            text += f"<|im_start|>{m['role']}\n".encode()
            spans.append((len(text), len(text) + len(m["content"].encode())))
            text += (m["content"] + "<|im_end|>\n").encode()
        at, expected, tail_done = 0, [], False
        for token in tokenizer.convert_ids_to_tokens(encoded.ids):
            raw = token.encode() if token in SPECIAL else bytes(to_byte[c] for c in token)
            assert text[at : at + len(raw)] == raw
            owner = next((s for s, (a, b) in enumerate(spans) if a < at + len(raw) and at < b), None)
            role = TEMPLATE if owner is None else RESPONSE if owner == len(messages) - 1 else PROMPT
            if owner is None and at >= spans[-1][1] and not tail_done:
                role, tail_done = RESPONSE, token in SPECIAL
            expected.append(role)
            at += len(raw)
        assert at == len(text)
        assert encoded.roles == expected, messages


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable alphabet of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def test_plain():
    tokenizer = byte_level(None)
    text = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    messages = [turn("system", "be kind"), turn("user", "the cat"), turn("assistant", "hello")]
    encoded = encode_turns(tokenizer, messages, template="plain")
    prompt, response = text("be kind\n\nthe cat"), text("hello")
    assert encoded.ids == [tokenizer.bos_token_id, *prompt, *response, tokenizer.eos_token_id]
    assert encoded.roles == [TEMPLATE] + [PROMPT] * len(prompt) + [RESPONSE] * (len(response) + 1)
    alone = encode_turns(tokenizer, messages[:2], template="plain")
    assert alone.ids == encoded.ids[: 1 + len(prompt)] and RESPONSE not in alone.roles


def test_template_without_end_token_keeps_its_tail():
    tokenizer = byte_level("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    encoded = encode_turns(tokenizer, [turn("user", "a"), turn("assistant", "hello")], template="chat")
    assert encoded.roles[-1] == TEMPLATE and RESPONSE in encoded.roles


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (NO_SYSTEM, [turn("system", "a"), turn("user", "b")], "refuses turns (system, user): System role not"),
        (CHATML.replace("m.content", "m.content.upper()"), [turn("user", "abc")], "changes the content of turn 0 (u"),
        ("{{ messages[-1].content }}", [turn("user", "a"), turn("user", "b")], "drops the content of turn 0 (user)"),
        (CHATML + CHATML, [turn("user", "a")], "repeats the content of turn 0 (user)"),
        ("{{ messages[1].content }}{{ messages[0].content }}", [turn("user", "a"), turn("user", "b")], "moves the"),
        (None, [turn("user", "a")], "has no chat template"),
        (CHATML, [{"role": "user", "content": [{"type": "image"}]}], "turn 0: must be"),
        ("{{ messages|length ", [turn("user", "a")], "refuses turns (user)"),
    ],
)  # fmt: skip
def test_bad_templates(template, messages, words):
    with pytest.raises(UserError) as error:
        encode_turns(byte_level(template), messages, template="chat")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="only fast tokenizers"):
        encode_turns(SimpleNamespace(is_fast=False), [], template="plain")


@pytest.mark.parametrize(
    ("obfuscate", "template", "expected"),
    [
        ("prompt", False, [0, 0, 1, 1, 0, 0, 0, 0]),
        ("prompt", True, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("all", False, [0, 0, 1, 1, 0, 1, 1, 0]),
        ("all", True, [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_obfuscation_mask(obfuscate, template, expected):
    roles = [TEMPLATE, TEMPLATE, PROMPT, PROMPT, TEMPLATE, RESPONSE, RESPONSE, TEMPLATE]
    mask = obfuscation_mask(roles, obfuscate=obfuscate, obfuscate_template=template)
    assert mask.dtype == bool and mask.tolist() == [bool(e) for e in expected]


def test_mask_without_response_covers_the_generation_prompt():
    mask = obfuscation_mask(np.array([TEMPLATE, PROMPT, TEMPLATE]), obfuscate="prompt", obfuscate_template=True)
    assert mask.all()


def test_empty_content_owns_no_token():
    tokenizer = character_level("{% for m in messages %}  {{ m.content }}  {% endfor %}")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" +|."), "isolated")
    encoded = encode_turns(tokenizer, [turn("user", ""), turn("user", "a")], template="chat")
    assert encoded.roles == [TEMPLATE, PROMPT, TEMPLATE]


def test_owners_of_tokens_by_walking_through_them():
    """Against a loop over tokens, on offsets as tokenizers give them: gaps, empty tokens, several on one character."""

    def walk(offsets, spans):
        owners, at, last = [], 0, 0
        filled = [(i, *span) for i, span in enumerate(spans) if span[0] < span[1]]
        for t, (start, end) in enumerate(offsets):
            if start == end:
                start, end = min(start, last), max(end, offsets[t + 1][0] if t + 1 < len(offsets) else end)
            last = max(last, offsets[t][1])
            while at < len(filled) and filled[at][2] <= start:
                at += 1
            owners.append(filled[at][0] if at < len(filled) and filled[at][1] < end else -1)
        return owners

    draw = random.Random(0)
    for _ in range(500):
        offsets, at = [], 0
        for _ in range(draw.randrange(12)):
            start = max(0, at + draw.choice([-1, 0, 0, 0, 1, 2]))
            at = start + draw.choice([0, 1, 2, 3])
            offsets.append((start, at))
        cuts = sorted(draw.randrange(at + 2) for _ in range(2 * draw.randrange(4)))
        spans = list(zip(cuts[::2], cuts[1::2], strict=True))
        assert _owners(offsets, spans) == walk(offsets, spans), (offsets, spans)
