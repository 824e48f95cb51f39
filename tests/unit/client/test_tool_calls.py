"""Calls out of what models of each family write, whole and in pieces of any size; what is none stays text."""

import json

import pytest

from sgt_titan.client.answer import Delta
from sgt_titan.client.reading import ChoiceReader, Reading, reading_of
from sgt_titan.client.reasoning import ThoughtScanner, begins_inside
from sgt_titan.client.tool_calls import FORMATS, CallScanner, format_of
from sgt_titan.errors import UserError

TOOL = {"type": "function", "function": {"name": "f"}}
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
        "mistral",
        f"[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{TEXT}[TOOL_CALLS]weather[CALL_ID]a1B2c3D4f[ARGS]{TEXT}",
        "",
        2,
    ),
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
    (  # a parameter that is not closed, and two functions in one pair of tags
        "qwen_xml",
        "<tool_call>\n"
        + "<function=weather>\n<parameter=city>\nKöln <b>\n<parameter=days>\n3\n</parameter>\n<parameter=deep>\n"
        '{"a": [1, null]}\n</function>\n' * 2 + "</tool_call>",
        "",
        2,
    ),
]
# What looks like a call and is none: every character of it is handed on.
NOT_WRITTEN = [
    ("hermes", "<tool_call>\nnot json\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "K'),  # cut off at max_tokens
    ("hermes", "a < b and <tool is no mark"),
    ("hermes", '<tool_call>{"nome": 1}</tool_call>'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", '{"name": "Anna", "age": 3}'),
    ("hermes", '<tool_call>{"name": "weather"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "sunny"}</tool_call>'),
    ("mistral", "[TOOL_CALLS]weather{not json}"),
    ("mistral", '[TOOL_CALLS] ["weather"]'),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    ("qwen_xml", '<tool_call>\n<function=f>\n{"a": 1}\n</function>\n</tool_call>'),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=a>\n1"),  # cut off
    ("llama3_json", "{not json"),
    ("mistral", "[TOOL_CALLS] are what I write"),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>"),
    ("qwen_xml", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
]


# What models were seen to write. Names, arguments and marks are theirs; where each was seen stands before it.
RECORDED = [
    # Hermes-2-Pro-Llama-3-8B, vllm-project/vllm#5649: arguments first; its end is left off at times, as it says there.
    (
        "hermes",
        '<tool_call>\n{"arguments": {"city": "Dallas", "state": "TX", "unit": "fahrenheit"}, '
        '"name": "get_current_weather"}\n</tool_call>',
        "",
        [("get_current_weather", {"city": "Dallas", "state": "TX", "unit": "fahrenheit"})],
    ),
    (
        "hermes",
        '<tool_call>\n{"arguments": {"city": "Dallas"}, "name": "get_current_weather"}\n',
        "",
        [("get_current_weather", {"city": "Dallas"})],
    ),
    # Qwen2.5, vllm-project/vllm#11392: no arguments.
    (
        "hermes",
        '<tool_call>\n{"name": "sql_db_list_tables", "arguments": {}}\n</tool_call>',
        "",
        [("sql_db_list_tables", {})],
    ),
    # Qwen3, vllm-project/vllm#19056.
    (
        "hermes",
        '<tool_call>\n{"name": "final_answer", "arguments": {"trigger": true}}\n</tool_call>',
        "",
        [("final_answer", {"trigger": True})],
    ),
    # Qwen3-32B, vllm-project/vllm#17790: a second object on a line of its own, in one pair of tags.
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
        "",
        [("add", {"a": 1}), ("add", {"a": 2})],
    ),
    # Qwen3-Coder, vllm-project/vllm#21571.
    (
        "qwen_xml",
        "<tool_call>\n<function=square_the_number>\n<parameter=input_num>\n1024\n</parameter>\n</function>\n</tool_call>",
        "",
        [("square_the_number", {"input_num": 1024})],
    ),
    # Qwen3-Coder-30B, ollama/ollama#17742, #16693: what opens is forgotten, what closes is not; words before it.
    (
        "qwen_xml",
        "<function=exec_command>\n<parameter=cmd>\necho LEAK_TEST\n</parameter>\n</function>\n</tool_call>",
        "",
        [("exec_command", {"cmd": "echo LEAK_TEST"})],
    ),
    (
        "qwen_xml",
        "I'll fetch the example.com webpage...\n\n<function=WebFetch>\n<parameter=url>\nhttps://example.com\n</parameter>\n"
        "</function>\n</tool_call>",
        "I'll fetch the example.com webpage...",
        [("WebFetch", {"url": "https://example.com"})],
    ),
    # Llama-3.3-70B, meta-llama/llama-models: models/llama3_3/prompt_format.md.
    (
        "llama3_json",
        '<|python_tag|>{\n    "type": "function",\n    "name": "trending_songs",\n    "parameters": {\n'
        '        "n": "10",\n        "genre": "all"\n    }\n}',
        "",
        [("trending_songs", {"n": "10", "genre": "all"})],
    ),
    # A Llama 3, vllm-project/vllm#19024: goes on talking.
    (
        "llama3_json",
        '{"type": "function", "name": "getOpenIncidentsTool", "parameters": {}} \n\n'
        "Would you like to know more about a specific open incident?",
        "Would you like to know more about a specific open incident?",
        [("getOpenIncidentsTool", {})],
    ),
    # Llama-3.2-11B, vllm-project/vllm#11786, with the brace that it forgot (below).
    (
        "llama3_json",
        '{"type": "function", "function": {"name": "get_current_traffic", "parameters": {"location": "Sydney"}}}',
        "",
        [("get_current_traffic", {"location": "Sydney"})],
    ),
    # Ministral-8B-Instruct-2410, ml-explore/mlx-lm#1374; Mistral-7B-v0.3, vllm-project/vllm#40531: more after the list.
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "calculator", "arguments": {"expression": "2+3"}}]',
        "",
        [("calculator", {"expression": "2+3"})],
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "calculator", "arguments": {"expression": "2+3"}}]\n\nThe answer',
        "The answer",
        [("calculator", {"expression": "2+3"})],
    ),
    # Devstral-Small-2-24B, vllm-project/vllm#30651: the server has left [ARGS] out.
    (
        "mistral",
        '[TOOL_CALLS]create_file{"filePath": "/workspaces/blabla.txt", '
        '"content": "This is a test file created to verify file creation functionality."}',
        "",
        [
            (
                "create_file",
                {
                    "filePath": "/workspaces/blabla.txt",
                    "content": "This is a test file created to verify file creation functionality.",
                },
            )
        ],
    ),
    # Magistral-Small-2509, vllm-project/vllm#48975.
    (
        "mistral",
        '[TOOL_CALLS]get_weather{"city":"San Francisco"}Estimating the weather...',
        "Estimating the weather...",
        [("get_weather", {"city": "San Francisco"})],
    ),
    # DeepSeek-V3, SGLang's documentation; and sgl-project/sglang#4379: a line break between two.
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"location": "Beijing", "unit": "celsius"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("get_weather", {"location": "Beijing", "unit": "celsius"})],
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_current_weather\n```json\n"
        '{"location": "Tokyo"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_current_weather\n```json\n"
        '{"location": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("get_current_weather", {"location": "Tokyo"}), ("get_current_weather", {"location": "Paris"})],
    ),
    # DeepSeek-V3.1, sgl-project/sglang#9446: words, then calls of the newer form.
    (
        "deepseek",
        "I'll check the weather in Shanghai for you.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_current_weather"
        '<｜tool▁sep｜>{"location": "Shanghai"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "I'll check the weather in Shanghai for you.",
        [("get_current_weather", {"location": "Shanghai"})],
    ),
]
# Seen as well, and no calls: a brace too few (#11786 above), and Llama's built-in tools (its prompt_format.md).
RECORDED_TEXT = [
    (
        "llama3_json",
        '{"type": "function", "function": {"name": "get_current_traffic", "parameters": {"location": "Sydney"}}',
    ),
    ("llama3_json", '<|python_tag|>brave_search.call(query="latest price of 1oz gold")'),
]


def scan(name, pieces, tools=()):
    scanner, shown, calls = CallScanner(name, tools), "", []
    for i, piece in enumerate(pieces):
        more, found = scanner.feed(piece, last=i == len(pieces) - 1)
        shown, calls = shown + more, calls + found
    return shown, calls


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


def every_split(text):
    """Whole, a character a piece, and cut in two at every place; with and without a last piece that is empty."""
    yield from ([text], [*text, ""], [*text])
    yield from ([text[:i], text[i:]] for i in range(len(text) + 1))


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("name, text, left, count", WRITTEN, ids=range(len(WRITTEN)))
def test_calls(name, text, left, count, size):
    shown, calls = scan(name, pieces(text, size))
    assert shown == left
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", ARGUMENTS)] * count
    assert len({call.id for call in calls}) == count
    if name == "mistral":  # its template wants ids of nine letters and digits
        assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)


@pytest.mark.parametrize("name, text, left, expected", RECORDED, ids=range(len(RECORDED)))
def test_what_models_were_seen_to_write(name, text, left, expected):
    tools = [{"type": "function", "function": {"name": called}} for called, _ in expected]
    for split in every_split(text):
        shown, calls = scan(name, split, tools)
        assert [(call.name, json.loads(call.arguments)) for call in calls] == expected, split
        assert shown.rstrip() == left, split  # line breaks between text and a call may go
    assert len(scan(name, [text])[1]) == len(expected)


@pytest.mark.parametrize("name, text", RECORDED_TEXT)
def test_what_models_were_seen_to_write_and_is_no_call(name, text):
    for split in every_split(text):
        assert scan(name, split) == (text, []), split


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("name, text", NOT_WRITTEN)
def test_what_is_no_call_is_text(name, text, size):
    assert scan(name, pieces(text, size)) == (text, [])


def test_a_call_without_its_mark_has_to_be_of_a_tool_that_there_is():
    """What has no mark may be an answer: an object with a name, or a page about calls."""
    for name, text in (
        ("llama3_json", '{"name": "Anna", "parameters": {"age": 3}}'),
        ("qwen_xml", "Write <function=example>\n<parameter=a>\n1\n</parameter>\n</function> for a call."),
    ):
        for split in every_split(text):
            assert scan(name, split, [TOOL]) == (text, []), split


@pytest.mark.parametrize(
    "name, begin, unit",
    [
        ("hermes", "<tool_call>", " "),
        ("hermes", "<tool_call>", '{"name": "f", "arguments": {}};'),
        ("llama3_json", "{", "{"),
        ("mistral", "[TOOL_CALLS]", "f"),
        ("mistral", "[TOOL_CALLS]f", " "),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]", "1"),
        ("mistral", "", "[TOOL_CALLS]f{}"),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>f", " "),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>f", "```\n"),
        ("qwen_xml", "<function=f>", "<parameter=a>"),
        ("qwen_xml", "<tool_call><function=f><parameter=a>", "\n"),
        ("qwen_xml", "", "<function=f></function>"),
    ],
)
def test_no_answer_keeps_it_busy(name, begin, unit):
    """It is read on the loop that serves everybody; work that grows with its square would take hours here."""
    scan(name, [begin + unit * (300_000 // len(unit))])


def test_arguments_are_json():
    """Whoever reads them has a stricter parser than ours."""
    for number in ("NaN", "-Infinity", "1e999"):
        text = f'<tool_call>{{"name": "f", "arguments": {{"x": {number}}}}}</tool_call>'
        assert scan("hermes", [text]) == (text, [])
    _, (call,) = scan("hermes", ['<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>'])
    assert call.arguments.encode() and json.loads(call.arguments) == {"x": "\ud83d"}
    text = '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'
    assert scan("hermes", [text]) == (text, [])
    deep = "[" * 100_000
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {deep}</tool_call>'
    assert scan("hermes", [text]) == (text, [])


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
    reader = ChoiceReader(Reading("hermes", True), tools=[TOOL], prompt_end="<think>\n")
    deltas = [
        Delta(0, "hm</think>\n\n<tool_"),
        Delta(0, 'call>{"name": "f", "arguments": {}}</tool_call>'),
        Delta(0, "", (), "stop"),
    ]
    read = [reader.feed(delta) for delta in deltas]
    assert "".join(d.reasoning for d in read) == "hm" and "".join(d.text for d in read) == ""
    assert [(i, c.name) for d in read for i, c in d.calls] == [(0, "f")] and read[-1].finish_reason == "tool_calls"
    without = ChoiceReader(Reading("hermes", False), tools=(), prompt_end="")
    assert without.feed(Delta(0, "<tool_call>x", (), "stop")) == Delta(0, "<tool_call>x", (), "stop")
