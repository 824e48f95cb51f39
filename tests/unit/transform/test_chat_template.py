"""What is trained on behind each kind of template: the parts of a sample by role, spelled out."""

from __future__ import annotations

import pytest

from sgt_titan.errors import UserError
from sgt_titan.transform.chat_template import look
from sgt_titan.transform.prompts import (
    CALLS_NOT_PRINTED,
    CLOSED_EMPTY,
    CONTENT_NOT_PRINTED,
    IDS_NOT_PRINTED,
    MARKS_NOT_READ,
    NOT_MARKED,
    PROMPT,
    RESPONSE,
    SPECIAL_IN_ANSWER,
    TEMPLATE,
    encode_turns,
)
from tests import chat_templates as templates
from tests.chat_templates import bytewise


def parts(template, messages, **options) -> list[tuple[int, str]]:
    """(role, text) of each run of tokens with one role."""
    tokenizer = bytewise(template)
    encoded = encode_turns(tokenizer, messages, template="chat", **options)
    runs: list[tuple[int, list[int]]] = []
    for token, role in zip(encoded.ids, encoded.roles, strict=True):
        if not runs or runs[-1][0] != role:
            runs.append((role, []))
        runs[-1][1].append(token)
    return [(role, tokenizer.decode(ids)) for role, ids in runs]


def user(content):
    return {"role": "user", "content": content}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


T, P, R = TEMPLATE, PROMPT, RESPONSE
HEAD, ASK = (T, "<|im_start|>user\n"), (T, "<|im_end|>\n<|im_start|>assistant\n")
THOUGHT = "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("template", "options", "answer", "expected"),
    [
        # The model writes its empty thoughts itself, or its own ones instead.
        ("thinks", {}, says("yes"), [HEAD, (P, "hi"), ASK, (R, "<think>\n\n</think>\n\nyes<|im_end|>"), (T, "\n")]),
        ("thinks", {}, says(THOUGHT), [HEAD, (P, "hi"), ASK, (R, THOUGHT + "<|im_end|>"), (T, "\n")]),
        ("thinks", {}, says("yes", reasoning_content="hm"),
         [HEAD, (P, "hi"), ASK, (R, THOUGHT + "<|im_end|>"), (T, "\n")]),
        ("thinks", {}, says("hm\n</think>\n\nyes"), [HEAD, (P, "hi"), ASK, (R, THOUGHT + "<|im_end|>"), (T, "\n")]),
        # The prompt has closed them: nobody would generate any.
        ("thinks", {"variables": {"enable_thinking": False}}, says(THOUGHT),
         [HEAD, (P, "hi"), (T, ASK[1] + "<think>\n\n</think>\n\n"), (R, "yes<|im_end|>"), (T, "\n")]),
        ("thinks", {"variables": {"enable_thinking": False}}, says("yes"),
         [HEAD, (P, "hi"), (T, ASK[1] + "<think>\n\n</think>\n\n"), (R, "yes<|im_end|>"), (T, "\n")]),
        # The prompt has opened them, and turns that are over hold them, empty ones too.
        ("thinks_opened", {}, says("yes"),
         [HEAD, (P, "hi"), (T, ASK[1] + "<think>\n\n</think>\n\n"), (R, "yes<|im_end|>"), (T, "\n")]),
        *(("thinks_opened", {}, answer,
           [HEAD, (P, "hi"), (T, ASK[1] + "<think>\n"), (R, "hm\n</think>\n\nyes<|im_end|>"), (T, "\n")])
          for answer in (says(THOUGHT), says("hm\n</think>\n\nyes"), says("yes", reasoning_content="hm"))),
        # The prompt has opened them.
        ("opens", {}, says(THOUGHT),
         [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n"), (R, "hm\n</think>\n\nyes</s>")]),
        ("opens", {}, says("hm\n</think>\n\nyes"),
         [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n"), (R, "hm\n</think>\n\nyes</s>")]),
        ("opens", {}, says("yes", reasoning_content="hm"),
         [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n"), (R, "hm\n</think>\n\nyes</s>")]),
        ("opens", {}, says("yes"),
         [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n\n</think>\n\n"), (R, "yes</s>")]),
        ("closes", {}, says("yes"), [(T, "<s><U>"), (P, "hi"), (T, "<A></think>"), (R, "yes</s>")]),
        ("closes", {}, says(THOUGHT), [(T, "<s><U>"), (P, "hi"), (T, "<A></think>"), (R, "yes</s>")]),
        ("closes", {"variables": {"thinking": True}}, says(THOUGHT),
         [(T, "<s><U>"), (P, "hi"), (T, "<A><think>"), (R, "\nhm\n</think>\n\nyes</s>")]),
        # Channels: what names the channel is generated.
        ("channels", {"date": "2025-01-02"}, says("yes"),
         [(T, "<|im_start|>system\nCurrent date: 2025-01-02<|im_end|><|im_start|>user: "), (P, "hi"),
          (T, "<|im_end|><|im_start|>assistant"), (R, " final: yes<|im_end|>")]),
        ("channels", {}, says("yes", reasoning_content="hm"),
         [(T, "<|im_start|>system\nCurrent date: 2024-07-26<|im_end|><|im_start|>user: "), (P, "hi"),
          (T, "<|im_end|><|im_start|>assistant"),
          (R, " analysis: hm<|im_end|><|im_start|>assistant final: yes<|im_end|>")]),
        ("dated", {}, says(" yes "),
         [(T, "<s><|im_start|>system\nToday: 26 Jul 2024\n<|im_end|><|im_start|>user\n\n"), (P, "hi"),
          (T, "<|im_end|><|im_start|>assistant\n\n"), (R, "yes<|im_end|>")]),
        ("dated", {"variables": {"date_string": "1 May"}}, says("yes"),
         [(T, "<s><|im_start|>system\nToday: 1 May\n<|im_end|><|im_start|>user\n\n"), (P, "hi"),
          (T, "<|im_end|><|im_start|>assistant\n\n"), (R, "yes<|im_end|>")]),
        ("generation", {}, says("yes"), [HEAD, (P, "hi"), ASK, (R, "yes<|im_end|>"), (T, "\n")]),
    ],
)  # fmt: skip
def test_an_answer_by_template(template, options, answer, expected):
    found = parts(templates.ALL[template], [user("hi"), answer], **options)
    assert found == expected
    # What the client sends is what stands before the answer.
    asked = parts(templates.ALL[template], [user("hi")], add_generation_prompt=True, **options)
    text = "".join(text for _, text in found)
    assert text.startswith("".join(text for _, text in asked))


def test_thoughts_of_earlier_turns_are_left_out_as_the_template_does():
    for template, close in (("thinks", "<|im_end|>"), ("opens", "</s>"), ("closes", "</s>")):
        found = parts(templates.ALL[template], [user("hi"), says(THOUGHT), user("so?"), says("no")])
        text = "".join(text for _, text in found)
        assert "hm" not in text and (P, "yes") in [(r, t.strip()) for r, t in found] and f"yes{close}" in text


BEGUN, OVER = "{% generation %}", "{% endgeneration %}"
MARKED = {
    # SmolLM3 marks the header of an answer too, and the line break behind its end.
    "header": templates.GENERATION.replace(BEGUN, "").replace(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}",
        "{% if m.role == 'assistant' %}" + BEGUN + "<|im_start|>assistant\n").replace(
        "{% else %}", "{% else %}<|im_start|>{{ m.role }}\n"),
    "answer": templates.GENERATION,
    "content": templates.CONTENT_MARKED,
    "nothing": templates.GENERATION.replace("{{ m.content }}<|im_end|>" + OVER, OVER + "{{ m.content }}<|im_end|>", 1),
    # The thoughts that it prints itself are not marked, its own end is.
    "thoughts": templates.GENERATION.replace(BEGUN, "<think>\n\n</think>\n\n" + BEGUN),
    # What the prompt has opened is not printed of turns that are over.
    "opens": templates.OPENS.replace("<A>{{ content }}{{ eos_token }}", f"<A>{BEGUN}{{{{ content }}}}{OVER}</s>"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("marked", "answer", "expected", "notes"),
    [
        ("header", "yes", [HEAD, (P, "hi"), ASK, (R, "yes<|im_end|>"), (T, "\n")], ()),
        ("answer", "yes", [HEAD, (P, "hi"), ASK, (R, "yes<|im_end|>"), (T, "\n")], ()),
        ("content", "yes", [HEAD, (P, "hi"), ASK, (R, "yes"), (T, "<|im_end|>\n")], (NOT_MARKED,)),
        ("nothing", "yes", [HEAD, (P, "hi"), (T, ASK[1] + "yes<|im_end|>\n")], (NOT_MARKED,)),
        ("thoughts", "yes", [HEAD, (P, "hi"), (T, ASK[1] + "<think>\n\n</think>\n\n"), (R, "yes<|im_end|>"), (T, "\n")],
         (NOT_MARKED,)),
        ("opens", "yes", [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n\n</think>\n\n"), (R, "yes"), (T, "</s>")],
         (CLOSED_EMPTY, NOT_MARKED)),
        ("opens", THOUGHT, [(T, "<s><U>"), (P, "hi"), (T, "<A><think>\n"), (R, "hm\n</think>\n\nyes"), (T, "</s>")],
         (NOT_MARKED, MARKS_NOT_READ)),
    ],
)  # fmt: skip
def test_a_template_s_own_marks_decide(marked, answer, expected, notes):
    """``{% generation %}``: what the template leaves out of an answer is no response, and that is said."""
    assert parts(MARKED[marked], [user("hi"), says(answer)]) == expected
    assert encode_turns(bytewise(MARKED[marked]), [user("hi"), says(answer)], template="chat").notes == notes
    # A client's prompt is the same with and without marks.
    bare = MARKED[marked].replace(BEGUN, "").replace(OVER, "")
    turns = [user("hi"), says("well"), user("so?")]
    assert parts(MARKED[marked], turns, add_generation_prompt=True) == parts(bare, turns, add_generation_prompt=True)


@pytest.mark.parametrize("marked", ["header", "answer", "content", "thoughts"])
@pytest.mark.parametrize("turns", [["hi, you", "yes, I"], ["a", "b", "c", "d"]])
def test_the_response_is_what_transformers_masks(marked, turns):
    """Of the last answer, up to its end: earlier answers and the header are sent by the client."""
    tokenizer, messages = bytewise(MARKED[marked]), [(user, says)[i % 2](text) for i, text in enumerate(turns)]
    own = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode_turns(tokenizer, messages, template="chat")
    assert encoded.ids == own["input_ids"]
    start = len(encode_turns(tokenizer, messages[:-1], template="chat", add_generation_prompt=True).ids)
    stop = max(t for t, i in enumerate(encoded.ids) if i == tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
    expected = [bool(m) and start <= t < stop for t, m in enumerate(own["assistant_masks"])]
    assert [role == RESPONSE for role in encoded.roles] == expected and any(expected)


def test_marks_on_calls_of_tools():
    marked = templates.THINKS.replace("{{ content }}{% for call", BEGUN + "{{ content }}{% for call").replace(
        "</tool_call>{% endfor %}<|im_end|>", "</tool_call>{% endfor %}<|im_end|>" + OVER
    )
    found = parts(marked, [user("hi"), says(None, tool_calls=[CALL])], tools=TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lisbon", "days": 2}}\n</tool_call><|im_end|>'
    assert found[-1] == (R, call) and found[-2][0] == T and found[-2][1].endswith("<think>\n\n</think>\n\n")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lisbon", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_calls_and_tools_are_content(content):
    messages = [
        user("hi"),
        says(content or None, tool_calls=[CALL]),
        {"role": "tool", "content": '{"c": 20}'},
        says("20"),
    ]
    found = parts(templates.THINKS, messages, tools=TOOLS)
    prompt = "".join(text for role, text in found if role == PROMPT)
    assert '{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}' in prompt
    assert 'weather", "arguments": {"city": "Lisbon", "days": 2' in prompt and '{"c": 20}' in prompt
    assert content in prompt and "<tool_call>" not in prompt and "<|im" not in prompt
    assert (R, "<think>\n\n</think>\n\n20<|im_end|>") in found
    # As the answer, the call is what the model writes.
    found = parts(templates.THINKS, messages[:2])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lisbon", "days": 2}}\n</tool_call>'
    between = "\n" if content else ""
    assert found[-2] == (R, f"<think>\n\n</think>\n\n{content}{between}{call}<|im_end|>")


def test_calls_that_are_a_whole_turn():
    messages = [user("hi"), says(None, tool_calls=[CALL]), {"role": "tool", "content": 'say "20"\n'}, says("20")]
    found = parts(templates.BARE_CALLS, messages)
    prompt = [text for role, text in found if role == PROMPT]
    assert prompt == ["hi", 'weather", "parameters": {"city": "Lisbon", "days": 2', 'say \\"20\\"\\n']
    found = parts(templates.BARE_CALLS, messages[:2])
    assert found[-1] == (R, '{"name": "weather", "parameters": {"city": "Lisbon", "days": 2}}<|im_end|>')


def test_calls_that_end_their_turn_or_begin_it_in_a_way_of_their_own():
    ask = [user("hi"), says(None, tool_calls=[CALL])]
    assert parts(templates.CHANNELS, ask)[-1] == (R, ' to=weather: {"city": "Lisbon", "days": 2}</s>')
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lisbon", "days": 2}}\n</tool_call><|im_end|>'
    *_, asked, answer, end = parts(templates.THINKS_OPENED, ask)
    assert asked[1].endswith("assistant\n<think>\n\n</think>\n\n") and (answer, end) == ((R, call), (T, "\n"))
    *_, asked, answer, end = parts(templates.THINKS_OPENED, [user("hi"), {**ask[1], "reasoning_content": "hm"}])
    assert asked[1].endswith("assistant\n<think>\n") and answer == (R, f"hm\n</think>\n\n{call}")
    # A begin that both share by accident is no call: "<" of the end of this turn, and of the thoughts.
    for template in (templates.OPENS, templates.CHATML):
        with pytest.raises(UserError, match="does not print the tool calls of an answer"):
            parts(template, ask)
    cut = templates.OPENS.replace("<A>{{ content }}", "<A>{{ content }}{% if m.tool_calls %}<two>"
                                  "{{ m.tool_calls[0].function.name }}{% endif %}")  # fmt: skip
    assert parts(cut, ask)[-1] == (R, "<two>weather</s>")
    both = [user("hi"), says("Let me see.", tool_calls=[CALL])]
    encoded = encode_turns(bytewise(templates.BARE_CALLS), both, template="chat")
    assert encoded.notes == (CONTENT_NOT_PRINTED,)


def test_arguments_of_calls_as_text():
    """DeepSeek-V3 adds them to a text; what is written is the JSON that its servers get."""
    turns = [user("hi"), says("", tool_calls=[CALL]), {"role": "tool", "content": "20"}, says("yes")]
    call = 'weather\n{"city": "Lisbon", "days": 2}'
    assert parts(templates.TEXT_CALLS, turns) == [
        (T, "<s><U>"), (P, "hi"), (T, "<A><|im_start|>function "), (P, call.removesuffix("}")),
        (T, "}<|im_end|></s><|im_start|>tool "), (P, "20"), (T, "<|im_end|>"), (R, "yes</s>"),
    ]  # fmt: skip
    assert parts(templates.TEXT_CALLS, turns[:2])[-1] == (R, f"<|im_start|>function {call}<|im_end|></s>")
    given = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Lisbon", "days": 2}'}}
    assert parts(templates.TEXT_CALLS, [user("hi"), says("", tool_calls=[given])]) == (
        parts(templates.TEXT_CALLS, turns[:2])
    )


@pytest.mark.parametrize("name", ["abcdef123", "call_abcdefghijklmnoabcdef123"])
def test_ids_of_calls(name):
    """Mistral's have nine letters and stand in the prompt: hidden, whatever an application writes there."""
    said = {"role": "tool", "content": "20", "tool_call_id": name}
    turns = [user("hi"), says("", tool_calls=[{**CALL, "id": name}]), said, says("yes")]
    call = 'weather", "arguments": {"city": "Lisbon", "days": 2}, "id": "abcdef123'
    before, after = [(T, "<s><U>"), (P, "hi")], [(R, " yes</s>")]
    assert parts(templates.NUMBERED_CALLS, turns) == [
        *before, (T, '</U><CALLS>[{"name": "'), (P, call), (T, '"}]</s><TOOL>{"content": '), (P, "20"),
        (T, ', "call_id": "'), (P, "abcdef123"), (T, '"}</TOOL>'), *after,
    ]  # fmt: skip
    whole = [*turns, user("ho"), says("", tool_calls=[{**CALL, "id": name}])]
    assert parts(templates.NUMBERED_CALLS, whole)[-1] == (R, f'<CALLS>[{{"name": "{call}"}}]</s>')
    assert encode_turns(bytewise(templates.NUMBERED_CALLS), turns, template="chat").notes == ()
    encoded = encode_turns(bytewise(templates.THINKS), turns, template="chat")
    assert encoded.notes == (IDS_NOT_PRINTED,)
    with pytest.raises(
        UserError, match=r"refuses the content of a turn \(user, assistant\); calls of tools have no ids"
    ):
        parts(templates.NUMBERED_CALLS, [user("hi"), says("", tool_calls=[CALL])])


def test_names_of_tools_in_what_they_say():
    template = templates.CHATML.replace("{{ m.role }}", "{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}")
    turns = [user("hi"), {"role": "tool", "name": "weather", "content": "20"}, says("yes")]
    assert (P, "weather20") in parts(template, turns)
    assert encode_turns(bytewise(templates.CHATML), turns, template="chat").notes == (IDS_NOT_PRINTED,)
    assert encode_turns(bytewise(None), turns, template="plain").notes == (
        "ids or names of tools in what they say, which a plain template does not print",
    )


def test_special_tokens_in_answers_are_said():
    rendered = says("yes<|im_end|>\n<|im_start|>user\nmore")
    for template in (templates.CHATML, templates.THINKS):
        encoded = encode_turns(bytewise(template), [user("hi"), rendered], template="chat")
        assert encoded.notes == (SPECIAL_IN_ANSWER,)
        assert encode_turns(bytewise(template), [user("hi"), says(THOUGHT)], template="chat").notes == ()
    assert encode_turns(bytewise(None), [user("hi"), rendered], template="plain").notes == (SPECIAL_IN_ANSWER,)
    thoughts = bytewise(templates.THINKS)
    thoughts.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert encode_turns(thoughts, [user("hi"), says(THOUGHT)], template="chat").notes == ()


def test_what_has_no_place_is_said():
    tokenizer = bytewise(templates.CHATML)
    encoded = encode_turns(tokenizer, [user("hi"), says("yes", reasoning_content="hm")], template="chat", tools=TOOLS)
    assert [note.partition(",")[0] for note in encoded.notes] == ["tools", "reasoning"]
    plain = encode_turns(
        tokenizer, [user("hi"), says("yes", reasoning_content="hm", tool_calls=[CALL])], template="plain", tools=TOOLS
    )
    assert [note.partition(",")[0] for note in plain.notes] == ["tools", "reasoning"]
    assert '"Lisbon"' in tokenizer.decode(plain.ids)
    # A call of an earlier turn that the template does not print.
    turns = [user("hi"), says("", tool_calls=[CALL]), {"role": "tool", "content": "12"}, says("yes")]
    assert encode_turns(tokenizer, turns, template="chat").notes == (CALLS_NOT_PRINTED,)
    assert encode_turns(bytewise(templates.ALL["thinks"]), turns, template="chat").notes == ()


def test_text_that_begins_with_bos_has_one():
    tokenizer = bytewise(None)
    encoded = encode_turns(tokenizer, [user("<s>hi")], template="plain")
    assert encoded.ids == encode_turns(tokenizer, [user("hi")], template="plain").ids
    assert encoded.roles == [TEMPLATE, PROMPT, PROMPT]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"a": "x", "b": "y"}, "its chat templates cannot be chosen from"),
        ("{{ messages[0].content.foo.bar() }}", "chat template: refuses turns (user): 'str object' has no attribute"),
        ("{{ 1 / 0 }}", "chat template: refuses turns (user): division by zero"),
        ("{{ messages[0]['content'] + 3 }}", "chat template: refuses turns (user): can only concatenate"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, words):
    with pytest.raises(UserError) as error:
        encode_turns(bytewise(template), [user("hi")], template="chat")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_of_a_list_of_templates_the_default_is_taken():
    tokenizer = bytewise({"default": templates.CHATML, "rag": "x"})
    assert encode_turns(tokenizer, [user("hi")], template="chat").ids == (
        encode_turns(bytewise(templates.CHATML), [user("hi")], template="chat").ids
    )


def test_lone_surrogates_and_nothing_are_refused():
    for template in ("chat", "plain"):
        with pytest.raises(UserError, match="lone surrogate"):
            encode_turns(bytewise(templates.CHATML), [user("a\ud800")], template=template)
        with pytest.raises(UserError, match="no turns"):
            encode_turns(bytewise(templates.CHATML), [], template=template)


def test_look_is_checked():
    with pytest.raises(UserError, match=r"data\.template_date: must be a date such as"):
        look({}, "yesterday")
    with pytest.raises(UserError, match=r"data\.template_kwargs\.messages: is set by the renderer"):
        look({"messages": 1})
