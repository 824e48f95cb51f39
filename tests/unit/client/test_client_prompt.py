import json
import shutil

import numpy as np
import pytest

from sgt_titan.client import Prompt, StainedGlassTransform
from sgt_titan.data.conversations import conversation
from sgt_titan.errors import UserError
from sgt_titan.transform.chat_template import DATE
from sgt_titan.transform.prompts import PROMPT, encode_turns
from tests import chat_templates
from tests.serving_kit import make_export, with_chat_template

CANARY = "Zorblax-7741"
USER = {"role": "user", "content": CANARY}
TOOL = {"type": "function", "function": {"name": "find_" + CANARY, "parameters": {}}}


@pytest.fixture(scope="module")
def plain(chat_trunk, tmp_path_factory):
    path = make_export(chat_trunk, tmp_path_factory.mktemp("plain") / "export", template="plain")
    return StainedGlassTransform.from_pretrained(path)


@pytest.mark.parametrize(
    "what, message",
    [
        ("", "is empty"),
        ([], "empty"),
        ([{"role": "user", "content": " "}], "every content is empty"),
        ([{"role": "wizard", "content": CANARY}], r"messages\[0\].role: must be one of"),
        ([{"role": ["user"], "content": CANARY}], r"messages\[0\].role"),
        ([{"content": CANARY}], r"messages\[0\].role"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}], "only text parts"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"id": CANARY}]}], r"messages\[1\].tool_calls"),
        (CANARY + "\ud800", "not valid Unicode"),
        ([{"role": "user", "content": CANARY + "\udfff"}], r"messages\[0\].content: is not valid Unicode"),
        (CANARY * 100, "1201 tokens, at most 128"),
        ([USER | {"content": CANARY * 100}], "tokens, at most 128"),
        ([0, 300], "token id outside 0..299"),
        ([0, -1], "token id outside"),
        ([0, True], "neither text, messages nor token ids"),
        ([USER, "text"], "neither text"),
        (3, "neither text"),
    ],
)
def test_bad_prompts(sgt, what, message):
    with pytest.raises(UserError, match=message) as refused:
        sgt.encode(what)
    assert CANARY not in str(refused.value) and "\n" not in str(refused.value)
    seen = refused.value.__context__, refused.value.__cause__
    assert not any(CANARY in repr(e) for e in seen if e is not None and not refused.value.__suppress_context__)


def test_a_template_that_refuses_a_content_does_not_repeat_it(chat_trunk, tmp_path):
    template = (
        "{% for m in messages %}{% if '7741' in m.content %}{{ raise_exception('bad: ' + m.content) }}{% endif %}"
    )
    folder = with_chat_template(make_export(chat_trunk, tmp_path / "export"), template + "{{ m.content }}{% endfor %}")
    config = json.loads((folder / "config.json").read_text())
    del config["fingerprints"]["tokenizer"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning):
        sgt = StainedGlassTransform.from_pretrained(folder)
    with pytest.raises(UserError, match="refuses the content of a turn") as refused:
        sgt.encode([USER])
    assert CANARY not in str(refused.value) and refused.value.__cause__ is None


def test_a_developer_is_a_system_where_the_template_knows_none(sgt):
    same = [[{"role": role, "content": "be kind"}, USER] for role in ("developer", "system")]
    assert sgt.prompt(same[0]).ids == sgt.prompt(same[1]).ids


def test_text_parts_are_joined(sgt):
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    assert sgt.prompt([{"role": "user", "content": parts}]).ids == sgt.prompt([{"role": "user", "content": "abcd"}]).ids


def test_special_tokens_that_a_user_writes_are_hidden(sgt):
    prompt = sgt.prompt([{"role": "user", "content": "a</s>b"}])
    end = prompt.ids.index(sgt.tokenizer.eos_token_id)
    assert prompt.mask[end]


def test_a_turn_to_be_continued_is_hidden_too(plain):
    prompt = plain.prompt([USER, {"role": "assistant", "content": "Once upon"}])
    assert prompt.mask[1:].all() and plain.tokenizer.decode(prompt.ids[1:]).startswith(CANARY)
    assert prompt.ids[-1] != plain.tokenizer.eos_token_id


def test_tools_are_rendered_and_hidden(sgt):
    prompt = sgt.prompt([USER], tools=[TOOL])
    decode = lambda mask: sgt.tokenizer.decode([i for i, m in zip(prompt.ids, mask, strict=True) if m])  # noqa: E731
    assert "find_" + CANARY in decode(prompt.mask) and CANARY not in decode(~prompt.mask)
    assert decode(~prompt.mask) == "<s><user></><assistant>"


def test_special_tokens_that_a_tool_holds_are_hidden(sgt):
    tool = {"type": "function", "function": {"name": "find", "description": "ends at </s>"}}
    prompt = sgt.prompt([USER], tools=[tool])
    assert prompt.mask[prompt.ids.index(sgt.tokenizer.eos_token_id)] and not prompt.mask[0]


@pytest.mark.parametrize(
    ("template", "fields", "shown"),
    [
        ("DATED", {"template_date": "2020-02-03"}, "Today: 03 Feb 2020"),
        ("THINKS", {"template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>"),
    ],
)
def test_date_and_variables_of_the_template_are_those_of_training(chat_trunk, tmp_path, template, fields, shown):
    folder = with_chat_template(shutil.copytree(chat_trunk, tmp_path / "trunk"), getattr(chat_templates, template))
    sgt = StainedGlassTransform.from_pretrained(make_export(folder, tmp_path / "export", **fields))
    prompt = sgt.prompt([{"role": "user", "content": "a"}])
    how = {"variables": fields.get("template_kwargs"), "date": fields.get("template_date", DATE)}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sample = encode_turns(sgt.tokenizer, turns, template="chat", **how)
    assert prompt.ids == sample.ids[: len(prompt.ids)] and shown in sgt.tokenizer.decode(prompt.ids)


@pytest.mark.parametrize("template", ["TEXT_CALLS", "NUMBERED_CALLS"])
def test_calls_are_rendered_as_in_training(chat_trunk, tmp_path, template):
    """DeepSeek's arguments and Mistral's ids: a client sends what a sample of the same turns begins with."""
    folder = with_chat_template(shutil.copytree(chat_trunk, tmp_path / "trunk"), getattr(chat_templates, template))
    sgt = StainedGlassTransform.from_pretrained(make_export(folder, tmp_path / "export"))
    function = {"name": "fi", "arguments": json.dumps({"w": "Z"})}
    call = {"id": "call_" + "a1" * 12, "type": "function", "function": function}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "b", "tool_call_id": call["id"]}]  # fmt: skip
    prompt = sgt.prompt(turns)
    row = conversation({"messages": [*turns, {"role": "assistant", "content": "c"}]}, "chat", {"messages": "messages"})
    sample = encode_turns(sgt.tokenizer, row.messages, template="chat")
    assert prompt.ids == sample.ids[: len(prompt.ids)]
    assert prompt.mask.tolist() == [role == PROMPT for role in sample.roles[: len(prompt.ids)]]
    clear = sgt.tokenizer.decode([i for i, m in zip(prompt.ids, prompt.mask, strict=True) if not m])
    assert not any(text in clear for text in ("Z", "a1", "fi"))


def test_tools_that_cannot_be_rendered(plain, chat_trunk, tmp_path):
    with pytest.raises(UserError, match="without a chat template"):
        plain.prompt([USER], tools=[TOOL])
    folder = shutil.copytree(chat_trunk, tmp_path / "trunk")
    with_chat_template(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    sgt = StainedGlassTransform.from_pretrained(make_export(folder, tmp_path / "export"))
    with pytest.raises(UserError, match="does not render them") as refused:
        sgt.prompt([USER], tools=[TOOL])
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools | tojson }}",  # then it is the tokenizer that fails, at a lone surrogate
        "{% for t in tools or [] %}{{ raise_exception('no such tool: ' + t.function.name) }}{% endfor %}",
        "{% for t in tools or [] %}{{ t.function.name + 1 }}{% endfor %}",
    ],
)
def test_a_failure_over_tools_does_not_repeat_them(chat_trunk, tmp_path, template):
    folder = shutil.copytree(chat_trunk, tmp_path / "trunk")
    with_chat_template(folder, template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    sgt = StainedGlassTransform.from_pretrained(make_export(folder, tmp_path / "export"))
    tool = {"type": "function", "function": {"name": CANARY + "\ud800"}}
    with pytest.raises(UserError, match="tools: ") as refused:
        sgt.prompt([USER], tools=[tool])
    assert CANARY not in str(refused.value) and refused.value.__suppress_context__


@pytest.mark.parametrize("tools", [5, "tools", [CANARY], {"name": CANARY}])
def test_what_are_no_tools(sgt, tools):
    with pytest.raises(UserError, match="tools: must be a list of objects"):
        sgt.prompt([USER], tools=tools)


def test_a_prompt_of_ones_own(sgt):
    mask = np.array([False, True, False])
    embeds_TD = sgt.encode(Prompt([5, 6, 7], mask))
    clean_TD = sgt.embed_tokens.weight[[5, 6, 7]]
    assert ((embeds_TD == clean_TD).all(-1).numpy() == ~mask).all()
