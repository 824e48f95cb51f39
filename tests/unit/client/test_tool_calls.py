"""Calls out of what models of each family write, whole and in pieces of any size; what is none stays text."""

import json

import pytest

from sgt_titan.client.answer import Delta
from sgt_titan.client.reading import ChoiceReader, Reading, reading_of
from sgt_titan.client.reasoning import ThoughtScanner, begins_inside
from sgt_titan.client.tool_calls import FORMATS, CallScanner, format_of
from sgt_titan.errors import UserError

ARGUMENTS = {"city": "Köln <b>", "days": 3, "deep": {"a": [1, None]}}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
# (format, what a model wrote, text that is left, calls)
WRITTEN = [
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>',
        "Let me see.\n",
        1,
    ),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {TEXT}}}</tool_call>\n' * 2, "", 2),
    ("llama3_json", f'{{"name": "weather", "parameters": {TEXT}}}', "", 1),
    ("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {TEXT}}}; ' * 1, "", 1),
    ("llama3_json", "; ".join([f'{{"name": "weather", "parameters": {TEXT}}}'] * 2), "", 2),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {TEXT}}}]', "", 1),
    ("mistral", f"Well. [TOOL_CALLS]weather[ARGS]{TEXT}[TOOL_CALLS]weather[ARGS]{TEXT}", "Well. ", 2),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + TEXT
        + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        1,
    ),
    (
        "deepseek",
        "Yes.<｜tool▁calls▁begin｜>"
        + f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{TEXT}<｜tool▁call▁end｜>" * 2
        + "<｜tool▁calls▁end｜>",
        "Yes.",
        2,
    ),
    (
        "qwen_xml",
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln <b>\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=deep>\n{"a": [1, null]}\n</parameter>\n</function>\n</tool_call>',
        "",
        1,
    ),
]
# What looks like a call and is none: every character of it is handed on.
NOT_WRITTEN = [
    ("hermes", "<tool_call>\nnot json\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "K'),  # cut off at max_tokens
    ("hermes", "a < b and <tool is no mark"),
    ("hermes", '<tool_call>{"nome": 1}</tool_call>'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", "{not json"),
    ("mistral", "[TOOL_CALLS] are what I write"),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>"),
    ("qwen_xml", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
]


def scan(name, text, size):
    scanner, shown, calls = CallScanner(name), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for i, piece in enumerate(pieces):
        more, found = scanner.feed(piece, last=i == len(pieces) - 1)
        shown, calls = shown + more, calls + found
    return shown, calls


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("name, text, left, count", WRITTEN, ids=range(len(WRITTEN)))
def test_calls(name, text, left, count, size):
    shown, calls = scan(name, text, size)
    assert shown == left
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", ARGUMENTS)] * count
    assert len({call.id for call in calls}) == count
    if name == "mistral":  # its template wants ids of nine letters and digits
        assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("name, text", NOT_WRITTEN)
def test_what_is_no_call_is_text(name, text, size):
    assert scan(name, text, size) == (text, [])


def test_text_is_not_held_back_longer_than_it_may_begin_a_call():
    scanner = CallScanner("hermes")
    assert scanner.feed("hello <to")[0] == "hello "
    assert scanner.feed("wn>")[0] == "<town>"


@pytest.mark.parametrize(
    "template, name",
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call>\n<function=example>", "qwen_xml"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("Environment: ipython", "llama3_json"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_template_says_which(template, name):
    assert format_of(template) == name
    assert reading_of(template).calls == name


def test_it_can_be_said_otherwise():
    assert reading_of("<tool_call> </think>", "none", "none") == Reading(None, False)
    assert reading_of(None, "mistral", "think") == Reading("mistral", True)
    assert Reading("mistral", False).special and not Reading("hermes", False).special and set(FORMATS) > {"hermes"}
    for bad in (("gpt", None), (None, "yes")):
        with pytest.raises(UserError, match="must be"):
            reading_of(None, *bad)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    "inside, text, thought, left",
    [
        (False, "<think>\nhm </thi hm\n</think>\n\nyes </think> no", "hm </thi hm\n", "yes </think> no"),
        (False, "no thoughts <think>", "", "no thoughts <think>"),
        (False, "<think>cut off", "cut off", ""),
        (False, "<thin", "", "<thin"),
        (True, "hm</think>yes", "hm", "yes"),
        (True, "\nhm, for ever", "hm, for ever", ""),
        (False, "", "", ""),
    ],
)
def test_thoughts(inside, text, thought, left, size):
    scanner, found = ThoughtScanner(inside), ["", ""]
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for i, piece in enumerate(pieces):
        for j, part in enumerate(scanner.feed(piece, i == len(pieces) - 1)):
            found[j] += part
    assert found == [thought, left]


def test_a_thought_may_be_opened_by_the_prompt():
    assert begins_inside("<|assistant|><think>\n") and not begins_inside("<think>\n\n</think>\n\n")
    assert not begins_inside("<|assistant|>")


def test_a_choice_is_taken_apart():
    reader = ChoiceReader(Reading("hermes", True), tools=True, prompt_end="<think>\n")
    deltas = [
        Delta(0, "hm</think>\n\n<tool_"),
        Delta(0, 'call>{"name": "f", "arguments": {}}</tool_call>'),
        Delta(0, "", (), "stop"),
    ]
    read = [reader.feed(delta) for delta in deltas]
    assert "".join(d.reasoning for d in read) == "hm" and "".join(d.text for d in read) == ""
    assert [(i, c.name) for d in read for i, c in d.calls] == [(0, "f")] and read[-1].finish_reason == "tool_calls"
    without = ChoiceReader(Reading("hermes", False), tools=False, prompt_end="")
    assert without.feed(Delta(0, "<tool_call>x", (), "stop")) == Delta(0, "<tool_call>x", (), "stop")
