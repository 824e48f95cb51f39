from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import pytest

from sgt_titan.data.cache import prepare
from sgt_titan.data.sources import load_rows
from sgt_titan.data.tokenization import (
    COUNTS,
    check_vocabulary,
    choose_template,
    kept,
    label_text,
    load_tokenizer,
    make_options,
    role_counts,
    tokenize_rows,
)
from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import PROMPT, RESPONSE, TEMPLATE

T, P, R = TEMPLATE, PROMPT, RESPONSE
ROLES = np.array([T, T, P, P, P, T, P, P, T, R, R, T])


@pytest.mark.parametrize(
    ("how", "seq_len", "expected"),
    [
        ("right", 12, range(12)),
        ("right", 5, range(5)),
        ("left", 12, range(12)),
        ("left", 8, [0, 1, 5, 7, 8, 9, 10, 11]),  # template and response stay whole
        ("left", 7, [0, 1, 5, 8, 9, 10, 11]),
        ("left", 6, None),
        ("drop", 12, range(12)),
        ("drop", 11, None),
    ],
)
def test_what_truncation_keeps(how, seq_len, expected):
    keep = kept(ROLES, seq_len, how)
    assert (None if keep is None else keep.nonzero()[0].tolist()) == (None if expected is None else list(expected))


def test_label_text():
    roles = np.array([T, P, P, P, P])
    assert label_text(roles, 0).tolist() == [T, P, P, P, P]
    assert label_text(roles, 3).tolist() == [T, P, P, P, R]
    assert label_text(roles, 9).tolist() == [T, P, P, P, P]


def test_role_counts_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(100):
        roles = rng.integers(0, 3, size=rng.integers(1, 12))
        got = dict(zip(COUNTS, role_counts(roles), strict=True))
        first = next((i for i, r in enumerate(roles) if r == R), len(roles))
        assert got == {
            "template": sum(r == T for r in roles),
            "prompt_template": sum(r == T for r in roles[:first]),
            "prompt": sum(r == P for r in roles),
            "response": sum(r == R for r in roles),
            "response_targets": sum(roles[t + 1] == R for t in range(len(roles) - 1)),
            "private": 0,
        }


def all_chunks(config, directory, workers=1):
    rows, tokenizer = load_rows(config.data), load_tokenizer(directory)
    return list(tokenize_rows(rows, tokenizer, directory, make_options(config, rows, tokenizer), workers=workers))


def test_documents_start_with_bos(write, make_config, tokenizer_dir):
    texts = ["the cat", "on the mat sat the dog"]
    config = make_config(write([{"text": t} for t in texts]), prompt_tokens=2)
    (chunk,) = all_chunks(config, tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    at = 0
    for text, length in zip(texts, chunk.lengths, strict=True):
        ids, roles = chunk.tokens[at : at + length], chunk.roles[at : at + length]
        assert ids.tolist() == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert roles.tolist() == [T, P, P, *[R] * (length - 3)][:length]
        at += length
    assert at == len(chunk.tokens)


def test_drops_are_counted(write, make_config, tokenizer_dir):
    rows = [{"text": ""}, {"text": "the"}, {"text": "the cat sat on the mat"}, {"text": "the cat sat on"}]
    config = make_config(write(rows), seq_len=5, truncation="drop", min_prompt_tokens=2)
    (chunk,) = all_chunks(config, tokenizer_dir)
    assert (chunk.read, len(chunk.lengths)) == (4, 1)
    assert {k: n for k, n in chunk.dropped.items() if n} == {"too_long": 1, "short_prompt": 2}
    config = make_config(write(rows), seq_len=5, truncation="right", min_prompt_tokens=2)
    (chunk,) = all_chunks(config, tokenizer_dir)
    assert chunk.truncated == 1 and chunk.lengths.tolist() == [5, 5]


def test_hash_is_that_of_the_whole_row(write, make_config, tokenizer_dir):
    source = write([{"text": "the cat sat on the mat"}, {"text": "the cat sat on the dog"}])
    short = all_chunks(make_config(source, seq_len=4), tokenizer_dir)[0]
    whole = all_chunks(make_config(source, seq_len=40), tokenizer_dir)[0]
    assert short.hashes.tolist() == whole.hashes.tolist()
    assert all_chunks(make_config(source, template_date="2020-01-01"), tokenizer_dir)[0].hashes.tolist() == (
        short.hashes.tolist()
    )
    assert len(set(short.hashes.tolist())) == 2


def thread(target, args, daemon) -> threading.Thread:
    pipe, *rest = args
    own = Connection(os.dup(pipe.fileno()))  # as a process has its own end, and its own open files
    return threading.Thread(target=target, args=(own, *pickle.loads(pickle.dumps(rest))), daemon=daemon)


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.distributed)])
def test_workers_change_nothing_and_name_the_bad_row(write, make_config, tokenizer_dir, monkeypatch, kind):
    if kind == "threads":  # the same without the seconds a process takes to import
        context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=thread)
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    rows = [{"text": f"the cat {i} sat on {i * i} mats"} for i in range(2100)]
    expected = all_chunks(make_config(write(rows[:2000], "good.jsonl")), tokenizer_dir)
    path = write([*rows, {"text": []}], "bad.jsonl")
    config = make_config(path)
    opened, tokenizer = load_rows(config.data), load_tokenizer(tokenizer_dir)
    options = make_options(config, opened, tokenizer)
    found = tokenize_rows(opened, tokenizer, tokenizer_dir, options, workers=2)
    for a in expected:
        b = next(found)
        for name in ("tokens", "roles", "lengths", "counts", "hashes", "sources", "marks", "mark_counts"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    last = next(found)
    assert last.first_bad == [f"{path}: row 2101: 'text' (field 'text') must be text, is list"]
    assert len(last.lengths) == 100


@pytest.mark.distributed
def test_a_killed_worker_is_an_error(write, make_config, tokenizer_dir):
    config = make_config(write([{"text": f"the cat {i} sat"} for i in range(20_000)]))
    opened, tokenizer = load_rows(config.data), load_tokenizer(tokenizer_dir)
    found = tokenize_rows(opened, tokenizer, tokenizer_dir, make_options(config, opened, tokenizer), workers=2)
    next(found)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(UserError, match=r"rows\.jsonl was killed, most likely for want of memory"):
        list(found)


def test_template_refusal_names_the_row(write, make_config, make_tokenizer):
    directory = make_tokenizer("backwards", template="{% for m in messages %}<{{ m.content[::-1] }}>{% endfor %}")
    path = write([{"instruction": "ab", "output": "c"}])
    (chunk,) = all_chunks(make_config(path), directory)
    assert chunk.first_bad[0].startswith(f"{path}: row 1: chat template: ") and chunk.bad.total() == 1


@pytest.mark.parametrize("depth", [400, 900, 5000])
@pytest.mark.parametrize("place", ["tools", "tools as text", "call", "call as text"])
def test_rows_that_are_nested_too_deeply_are_bad_rows(write, make_config, tokenizer_dir, depth, place):
    """Also where JSON reads them and only what walks through them cannot: never a traceback."""
    deep = '[{"a":' + "[" * depth + "]" * depth + "}]"
    value = json.dumps(deep) if "text" in place else deep
    call = '{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '
    call += value + "}}]}"
    answer = {"role": "assistant", "content": "b"}
    said = json.dumps(answer) if "tools" in place else call
    more = f', "tools": {value}' if "tools" in place else ""
    path = write([{"messages": [{"role": "user", "content": f"a {i}"}, answer]} for i in range(9)])
    with open(path, "a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}, ' + said + "]" + more + "}\n")
    config = make_config(path, template="plain", max_bad_share=0.5)
    found = prepare(config, tokenizer_dir, progress=False).meta
    assert found["rows_read"] == 10 and found["samples"] + found["bad_rows"]["count"] == 10
    assert depth == 400 or found["bad_rows"]["count"] == 1


def test_fractions_as_weights_are_counted(write, make_config, tokenizer_dir):
    rows = [{"messages": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b", "weight": w}]}
            for i, w in enumerate([1] * 8 + [0.5, 0.25])]  # fmt: skip
    found = prepare(make_config(write(rows), max_bad_share=0.5), tokenizer_dir, progress=False).meta["bad_rows"]
    assert found["count"] == 2 and all("is neither zero nor one" in reason for reason in found["reasons"])
    assert "row 9: turn 1 of 'messages': weight 0.5 is neither" in found["first"][0]


def test_choose_template(tokenizer_dir, plain_tokenizer_dir):
    chat, plain = load_tokenizer(tokenizer_dir), load_tokenizer(plain_tokenizer_dir)
    assert choose_template("auto", "chat", chat) == "chat"
    assert choose_template("auto", "chat", plain) == "plain"
    assert choose_template("auto", "text", chat) == "plain"
    assert choose_template("plain", "chat", chat) == "plain"
    with pytest.raises(UserError, match="no chat template"):
        choose_template("chat", "chat", plain)
    with pytest.raises(UserError, match="format text has none"):
        choose_template("chat", "text", chat)


def test_check_vocabulary(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=rf"has id {len(tokenizer) - 1}, .*vocab_size is {len(tokenizer) - 1}"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)


def test_options_are_checked(write, make_config, tokenizer_dir):
    instruction = write([{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match=r"data\.prompt_tokens: is for format text"):
        all_chunks(make_config(instruction, prompt_tokens=3), tokenizer_dir)
    with pytest.raises(UserError, match=r"training\.seq_len: must be at least 2"):
        all_chunks(make_config(instruction, seq_len=1), tokenizer_dir)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no tokenizer\.json") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
