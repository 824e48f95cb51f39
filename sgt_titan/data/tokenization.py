"""Rows to token ids and roles: templates, truncation, and what makes a sample unusable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgt_titan.config import schema
from sgt_titan.config.paths import expand
from sgt_titan.data.marks import fold, mark
from sgt_titan.data.sources import Rows
from sgt_titan.data.surrogates import finders, with_surrogates
from sgt_titan.errors import UserError
from sgt_titan.transform.chat_template import look
from sgt_titan.transform.prompts import PROMPT, RESPONSE, TEMPLATE, encode_turns, response_start
from sgt_titan.transform.tokenizer import load_tokenizer as load_from

# Columns of a sample's role counts. A target is a token that some position predicts: any but the first.
COUNTS = ("template", "prompt_template", "prompt", "response", "response_targets", "private")

MARK_FIELDS = 5

DROPS = ("too_long", "short_prompt")
PARALLEL_ROWS = 50_000
CHUNK_ROWS = 1_000
MAX_WORKERS = 32


@dataclass(frozen=True)
class Options:
    """Everything but the rows and the tokenizer that decides the tokens."""

    format: str
    columns: tuple[tuple[str, str], ...]
    template: str
    prompt_tokens: int
    truncation: str
    seq_len: int
    min_prompt_tokens: int
    max_samples: int
    strip_suffix: str
    variables: str  # canonical JSON, see chat_template.Look
    date: str
    private: str = ""  # finders, and the file of a user's own; see surrogates.py
    private_own: str = ""
    private_own_digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Without what is not used: rows without surrogates stay the rows they were."""
        found = asdict(self)
        path = found.pop("private_own")  # where a file lies decides nothing
        return found if self.private or path else {k: v for k, v in found.items() if not k.startswith("private")}


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows, tokenized: flat uint32 tokens and uint8 roles, per-sample lengths (int64),
    role counts (int32, see COUNTS), hashes (uint64) and row numbers in the source (int64); marks of private values,
    int32 (M, 5): start, stop, lead, characters, index in ``kinds`` (see ``marks.Mark``), and how many each sample has
    (int64); rows read and dropped by reason; values marked and those of them that no prompt holds."""

    tokens: np.ndarray
    roles: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    marks: np.ndarray
    mark_counts: np.ndarray
    kinds: list[str]
    read: int
    dropped: dict[str, int]
    truncated: int
    marked_values: int
    values_not_found: int


def load_tokenizer(directory: str) -> Any:
    """The tokenizer of a checkpoint directory. Raises UserError as ``transform.tokenizer.load_tokenizer``."""
    return load_from(expand(str(directory), "trunk.path"))


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce a token the embedding table has no row for.

    Raises:
        UserError: a token id is ``vocab_size`` or more.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"tokenizer: token {token!r} has id {largest}, but the trunk's vocab_size is {vocab_size}; the tokenizer "
            "belongs to another model"
        )


def choose_template(data_template: str, fmt: str, tokenizer: Any) -> str:
    """``chat`` or ``plain`` for a ``data.template`` of auto, chat or plain.

    Raises:
        UserError: chat asked for without turns or without a chat template.
    """
    if data_template == "auto":
        return "chat" if fmt != "text" and tokenizer.chat_template else "plain"
    if data_template == "chat" and fmt == "text":
        raise UserError("data.template: chat needs turns and format text has none; use auto or plain")
    if data_template == "chat" and not tokenizer.chat_template:
        raise UserError("data.template: chat, but the trunk's tokenizer has no chat template; use auto or plain")
    return data_template


def make_options(config: schema.Config, rows: Rows, tokenizer: Any) -> Options:
    """The options of a configuration, with nothing left to decide.

    Raises:
        UserError: a template that does not fit, or a seq_len below 2 (no token would predict another).
    """
    data, seq_len = config.data, config.training.seq_len
    if seq_len < 2:
        raise UserError(f"training.seq_len: must be at least 2, got {seq_len}")
    if data.prompt_tokens and rows.format != "text":
        raise UserError(f"data.prompt_tokens: is for format text; {rows.name} has format {rows.format}; use 0")
    how = look(data.template_kwargs, data.template_date)
    return Options(
        format=rows.format,
        columns=tuple(sorted(rows.columns.items())),
        template=choose_template(data.template, rows.format, tokenizer),
        prompt_tokens=data.prompt_tokens,
        truncation=data.truncation,
        seq_len=seq_len,
        min_prompt_tokens=data.min_prompt_tokens,
        max_samples=data.max_samples,
        strip_suffix=rows.strip_suffix,
        variables=how.variables,
        date=how.date,
        **_private(data),
    )


def _private(data: schema.Data) -> dict[str, str]:
    """Raises UserError: a finder or a file of one's own that is none."""
    if not data.private and not data.private_own:
        return {}
    own = expand(data.private_own, "data.private_own") if data.private_own else ""
    finders(data.private, own)
    digest = hashlib.sha256(Path(own).read_bytes()).hexdigest() if own else ""
    return {"private": data.private, "private_own": own, "private_own_digest": digest}


def truncate(ids_T: np.ndarray, roles_T: np.ndarray, seq_len: int, how: str) -> tuple[np.ndarray, np.ndarray] | None:
    """At most ``seq_len`` tokens, or None if the sample is to be dropped.

    ``right`` cuts the end. ``left`` takes out the first prompt tokens, as many as needed: the template around
    them stays whole, and so does the response; None if the prompt is not long enough for that.
    """
    excess = len(ids_T) - seq_len
    if excess <= 0:
        return ids_T, roles_T
    if how == "right":
        return ids_T[:seq_len], roles_T[:seq_len]
    prompt = np.flatnonzero(roles_T == PROMPT)
    if how == "drop" or len(prompt) < excess:
        return None
    keep = np.ones(len(ids_T), dtype=bool)
    keep[prompt[:excess]] = False
    return ids_T[keep], roles_T[keep]


def label_text(roles_T: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """Roles of a document: its first ``prompt_tokens`` content tokens stay PROMPT, the rest become RESPONSE."""
    if prompt_tokens:
        content = np.flatnonzero(roles_T == PROMPT)
        roles_T = roles_T.copy()
        roles_T[content[prompt_tokens:]] = RESPONSE
    return roles_T


def role_counts(roles_T: np.ndarray, private: int = 0) -> tuple[int, ...]:
    """How many tokens of each kind in COUNTS a sample has; ``private`` is known by its marks."""
    template = roles_T == TEMPLATE
    response = roles_T == RESPONSE
    return (
        int(template.sum()),
        int(template[: response_start(roles_T)].sum()),
        int((roles_T == PROMPT).sum()),
        int(response.sum()),
        int(response[1:].sum()),
        private,
    )


def content_hash(messages: Any) -> int:
    """64 bits of what a row says, before anything is made of it."""
    text = json.dumps(messages, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def private_tokens(marks_M5: np.ndarray, length: int) -> np.ndarray:
    """Which of a sample's tokens carry a private value: bool (length,)."""
    edges = np.zeros(length + 1, dtype=np.int32)
    np.add.at(edges, marks_M5[:, 0], 1)
    np.add.at(edges, marks_M5[:, 1], -1)
    return np.cumsum(edges[:-1]) > 0


def tokenize_chunk(rows: Rows, tokenizer: Any, options: Options, start: int, stop: int) -> Chunk:
    """Tokenize rows start..stop-1.

    The hash of a sample is that of its row's content, so that the held-out samples of a data set are the same at every
    seq_len, behind every template and on every day.

    Raises:
        UserError: a row that cannot be used at all (missing field, refused by the template); names the row.
    """
    ids_parts, role_parts, counts, hashes, sources = [], [], [], [], []
    marks, mark_counts, kinds = [], [], {}
    dropped = dict.fromkeys(DROPS, 0)
    truncated, values, values_not_found = 0, 0, 0
    variables = json.loads(options.variables)
    for i in range(start, stop):
        messages, units = rows.sample(i)
        content = content_hash(messages)
        if options.private or options.private_own:
            private = finders(options.private, options.private_own)
            messages, units = with_surrogates(messages, units, i, private)
        try:
            encoded = encode_turns(
                tokenizer, messages, template=options.template, variables=variables, date=options.date
            )
        except UserError as error:
            raise UserError(f"{rows.where(i)}: {error}") from error
        ids = np.array(encoded.ids, dtype=np.uint32)
        cut = truncate(ids, np.array(encoded.roles, dtype=np.uint8), options.seq_len, options.truncation)
        if cut is None:
            dropped["too_long"] += 1
            continue
        roles = label_text(cut[1], options.prompt_tokens)
        count = role_counts(roles)
        # A sample needs two tokens, one to predict from and one to predict.
        if count[COUNTS.index("prompt")] < options.min_prompt_tokens or len(roles) < 2:
            dropped["short_prompt"] += 1
            continue
        truncated += len(cut[0]) < len(ids)
        here = list(mark(tokenizer, cut[0], roles, units)) if units else []
        rows_M5 = [(m.start, m.stop, m.lead, len(m.text), kinds.setdefault(m.kind, len(kinds))) for m in here]
        marks_M5 = np.array(rows_M5, dtype=np.int32).reshape(-1, MARK_FIELDS)
        if here:
            count = (*count[:-1], int(private_tokens(marks_M5, len(roles)).sum()))
            marks.append(marks_M5)
        mark_counts.append(len(here))
        values += len(units)
        if units:
            said = {fold(m.text)[0] for m in here}
            values_not_found += sum(fold(text)[0] not in said for text, _ in units)
        ids_parts.append(cut[0])
        role_parts.append(roles)
        counts.append(count)
        hashes.append(content)
        sources.append(i)
    return Chunk(
        tokens=np.concatenate(ids_parts) if ids_parts else np.zeros(0, np.uint32),
        roles=np.concatenate(role_parts) if role_parts else np.zeros(0, np.uint8),
        lengths=np.array([len(p) for p in ids_parts], dtype=np.int64),
        counts=np.array(counts, dtype=np.int32).reshape(-1, len(COUNTS)),
        hashes=np.array(hashes, dtype=np.uint64),
        sources=np.array(sources, dtype=np.int64),
        marks=np.concatenate(marks) if marks else np.zeros((0, MARK_FIELDS), np.int32),
        mark_counts=np.array(mark_counts, dtype=np.int64),
        kinds=list(kinds),
        read=stop - start,
        dropped=dropped,
        truncated=truncated,
        marked_values=values,
        values_not_found=values_not_found,
    )


def tokenize_rows(
    rows: Rows, tokenizer: Any, tokenizer_dir: str, options: Options, *, workers: int | None = None
) -> Iterator[Chunk]:
    """All rows as chunks, in order, holding a few chunks in memory at a time.

    ``workers`` processes; None: one per available core when there are more than PARALLEL_ROWS rows.

    Raises:
        UserError: as ``tokenize_chunk``; a process was killed.
    """
    ranges = [(a, min(a + CHUNK_ROWS, len(rows))) for a in range(0, len(rows), CHUNK_ROWS)]
    if workers is None:
        expected = min(len(rows), options.max_samples or len(rows))
        workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if expected > PARALLEL_ROWS else 1
    if workers <= 1 or len(ranges) <= 1:
        for start, stop in ranges:
            yield tokenize_chunk(rows, tokenizer, options, start, stop)
        return
    # Spawned, not forked: the parent may hold threads of torch and of the tokenizer. A pipe each and chunks in turn: a
    # killed process is the end of its pipe at once, where a pool's shared queues would wait for ever.
    import multiprocessing

    context, pipes = multiprocessing.get_context("spawn"), []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            context.Process(target=_work, args=(theirs, rows, str(tokenizer_dir), options), daemon=True).start()
            theirs.close()
        asked = 0
        for chunk in range(len(ranges)):
            while asked < min(chunk + 2 * workers, len(ranges)):  # no faster than results are taken
                pipes[asked % workers].send(ranges[asked])
                asked += 1
            result = pipes[chunk % workers].recv()
            if isinstance(result, Exception):
                raise result
            yield result
    except (EOFError, ConnectionError):
        raise UserError(
            f"data.source: a process that tokenized {rows.name} was killed, most likely for want of memory; start "
            "again with more memory or fewer cores (one process each)"
        ) from None
    finally:
        for pipe in pipes:
            pipe.close()  # a process that reads the end of its pipe ends


def _work(pipe: Any, rows: Rows, tokenizer_dir: str, options: Options) -> None:
    """A process: row ranges come, chunks or errors go, until the pipe is closed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    tokenizer = load_tokenizer(tokenizer_dir)
    with suppress(EOFError, ConnectionError):
        while True:
            bounds = pipe.recv()
            try:
                result: Chunk | Exception = tokenize_chunk(rows, tokenizer, options, *bounds)
            except Exception as error:
                result = error
            pipe.send(result)
