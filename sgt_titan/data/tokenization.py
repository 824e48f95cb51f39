"""Rows to token ids and roles: templates, truncation, and what makes a sample unusable."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from sgt_titan.config import schema
from sgt_titan.config.paths import expand
from sgt_titan.data.conversations import Conversation
from sgt_titan.data.marks import MarkError, Units, fold, forms, mark
from sgt_titan.data.sources import Rows
from sgt_titan.data.surrogates import finders, found_by, with_surrogates
from sgt_titan.errors import UserError
from sgt_titan.processes import told
from sgt_titan.transform.chat_template import CallStyle, call_style, look, marks_answers, source, thinking
from sgt_titan.transform.prompts import PROMPT, RESPONSE, TEMPLATE, EncodedPrompt, encode_turns, response_start
from sgt_titan.transform.tokenizer import load_tokenizer as load_from

# Columns of a sample's role counts. A target is a token that some position predicts: any but the first.
COUNTS = ("template", "prompt_template", "prompt", "response", "response_targets", "private")

MARK_FIELDS = 5
_CANONICAL = json.JSONEncoder(sort_keys=True)

# Samples that are left out: why.
DROPS = ("too_long", "short_prompt", "response_cut", "no_response")
MAX_REASONS, FIRST_BAD = 30, 10
TOO_DEEP = "is nested too deeply"  # JSON that can be read, and that nobody who walks through it can
PARALLEL_ROWS = 50_000
CHUNK_ROWS = 1_000
MAX_WORKERS = 32


@dataclass(frozen=True)
class TokenOptions:
    """Everything but the rows and the tokenizer that decides the tokens."""

    format: str
    columns: tuple[tuple[str, str], ...]
    template: Literal["chat", "plain"]
    prompt_tokens: int
    truncation: str
    seq_len: int
    min_prompt_tokens: int
    max_samples: int
    strip_suffix: str
    variables: str  # canonical JSON, see chat_template.Look
    date: str
    roles: tuple[tuple[str, str], ...]
    answers: str
    need_response: bool
    private: str = ""  # finders, and the file of a user's own; see surrogates.py
    private_own: str = ""
    private_own_digest: str = ""
    private_version: str = ""  # of their drawing, and of the lists by which values are found
    generation_marks: bool = False  # the template says what of an answer is generated
    answers_version: int = 0  # see _answers_version

    def as_dict(self) -> dict[str, Any]:
        """Without what is not used: rows without surrogates stay the rows they were."""
        found = asdict(self)
        path = found.pop("private_own")  # where a file lies decides nothing
        found = {k: v for k, v in found.items() if v or k not in ("generation_marks", "answers_version")}
        return found if self.private or path else {k: v for k, v in found.items() if not k.startswith("private")}


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows, tokenized: flat uint32 tokens and uint8 roles, per-sample lengths (int64),
    role counts (int32, see COUNTS), hashes (uint64) and row numbers in the source (int64); marks of private values,
    int32 (M, 5): start, stop, lead, characters, index in ``kinds`` (see ``marks.Mark``), and how many each sample has
    (int64); rows read; samples dropped, bad rows, and what of rows was not used, by reason; values marked and those of
    them that no prompt holds."""

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
    bad: Counter[str]
    first_bad: list[str]
    notes: Counter[str]
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


def choose_template(
    data_template: Literal["auto", "chat", "plain"], fmt: str, tokenizer: Any
) -> Literal["chat", "plain"]:
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
    return "chat" if data_template == "chat" else "plain"


def make_options(config: schema.Config, rows: Rows, tokenizer: Any) -> TokenOptions:
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
    template = choose_template(data.template, rows.format, tokenizer)
    return TokenOptions(
        format=rows.format,
        columns=tuple(sorted(rows.columns.items())),
        template=template,
        prompt_tokens=data.prompt_tokens,
        truncation=data.truncation,
        seq_len=seq_len,
        min_prompt_tokens=data.min_prompt_tokens,
        max_samples=data.max_samples,
        strip_suffix=rows.strip_suffix,
        variables=how.variables,
        date=how.date,
        roles=rows.roles,
        answers=data.answers,
        need_response=config.objective.utility_positions == "response",
        generation_marks=template == "chat" and any(marks_answers(tokenizer, tools=t) for t in (False, True)),
        answers_version=_answers_version(tokenizer) if template == "chat" else 0,
        **_private(data),
    )


def _answers_version(tokenizer: Any) -> int:
    """Of what answers and calls become, behind templates that print more than words; 0 where there is nothing else.

    2: thoughts that a template closes itself, and calls, stand there once. 3: ids of calls, and arguments as text.
    """
    templates = [source(tokenizer, tools=t) for t in (False, True)]
    if any("tool_call_id" in template or call_style(tokenizer, template) != CallStyle() for template in templates):
        return 3
    return 2 if thinking(tokenizer) is not None or any("tool_calls" in template for template in templates) else 0


def _private(data: schema.Data) -> dict[str, str]:
    """Raises UserError: a finder or a file of one's own that is none."""
    if not data.private and not data.private_own:
        return {}
    own = expand(data.private_own, "data.private_own") if data.private_own else ""
    finders(data.private, own)
    digest = hashlib.sha256(Path(own).read_bytes()).hexdigest() if own else ""
    versions = found_by(data.private)
    return {"private": data.private, "private_own": own, "private_own_digest": digest, "private_version": versions}


def kept(roles_T: np.ndarray, seq_len: int, how: str) -> np.ndarray | None:
    """Which tokens stay, at most ``seq_len``: bool (T,), or None if the sample is to be dropped.

    ``right`` cuts the end. ``left`` takes out the first prompt tokens, as many as needed: the template around
    them stays whole, and so does the response; None if the prompt is not long enough for that.
    """
    keep, excess = np.ones(len(roles_T), dtype=bool), len(roles_T) - seq_len
    if excess <= 0:
        return keep
    if how == "right":
        keep[seq_len:] = False
        return keep
    prompt = np.flatnonzero(roles_T == PROMPT)
    if how == "drop" or len(prompt) < excess:
        return None
    keep[prompt[:excess]] = False
    return keep


def label_text(roles_T: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """Roles of a document: its first ``prompt_tokens`` content tokens stay PROMPT, the rest become RESPONSE."""
    if prompt_tokens:
        content = np.flatnonzero(roles_T == PROMPT)
        roles_T = roles_T.copy()
        roles_T[content[prompt_tokens:]] = RESPONSE
    return roles_T


def role_counts(roles_T: np.ndarray, private: int = 0) -> tuple[int, ...]:
    """How many tokens of each kind in COUNTS a sample has; ``private`` is known by its marks."""
    found = np.bincount(roles_T, minlength=3).tolist()
    before = np.bincount(roles_T[: response_start(roles_T)], minlength=3)
    targets = found[RESPONSE] - int(len(roles_T) > 0 and roles_T[0] == RESPONSE)
    return found[TEMPLATE], int(before[TEMPLATE]), found[PROMPT], found[RESPONSE], targets, private


def content_hash(messages: Any) -> int:
    """64 bits of what a row says, before anything is made of it."""
    text = _CANONICAL.encode(messages)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def private_tokens(marks_M5: np.ndarray, length: int) -> np.ndarray:
    """Which of a sample's tokens carry a private value: bool (length,)."""
    edges = np.zeros(length + 1, dtype=np.int32)
    np.add.at(edges, marks_M5[:, 0], 1)
    np.add.at(edges, marks_M5[:, 1], -1)
    return np.cumsum(edges[:-1]) > 0


class Parts:
    """A chunk in the making."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.roles: list[np.ndarray] = []
        self.counts: list[tuple[int, ...]] = []
        self.hashes: list[int] = []
        self.sources: list[int] = []
        self.marks: list[np.ndarray] = []
        self.mark_counts: list[int] = []
        self.kinds: dict[str, int] = {}
        self.dropped = dict.fromkeys(DROPS, 0)
        self.bad: Counter[str] = Counter()
        self.first_bad: list[str] = []
        self.notes: Counter[str] = Counter()
        self.truncated = self.values = self.values_not_found = 0

    def add(
        self,
        encoded: EncodedPrompt,
        hashed: int,
        source: int,
        units: Units,
        tokenizer: Any,
        options: TokenOptions,
    ):
        """A sample, or a reason why it is none."""
        ids, whole = np.array(encoded.ids, dtype=np.uint32), np.array(encoded.roles, dtype=np.uint8)
        keep: np.ndarray | slice | None = slice(None)
        if len(ids) > options.seq_len:
            keep = kept(whole, options.seq_len, options.truncation)
        if keep is None:
            self.dropped["too_long"] += 1
            return
        ids, roles = ids[keep], label_text(whole[keep], options.prompt_tokens)
        count = role_counts(roles)
        # A sample needs two tokens, one to predict from and one to predict.
        if count[COUNTS.index("prompt")] < options.min_prompt_tokens or len(roles) < 2:
            self.dropped["short_prompt"] += 1
            return
        if options.need_response and not count[COUNTS.index("response_targets")]:
            had = role_counts(label_text(whole, options.prompt_tokens))[COUNTS.index("response_targets")]
            self.dropped["response_cut" if had else "no_response"] += 1
            return
        self.truncated += len(roles) < len(whole)
        spans_T2 = np.array(encoded.spans, dtype=np.int64)[keep] if units and encoded.spans else None
        here = list(mark(tokenizer, ids, roles, units, text=encoded.text, spans_T2=spans_T2)) if units else []
        if here:
            rows_M5 = [
                (m.start, m.stop, m.lead, len(m.text), self.kinds.setdefault(m.kind, len(self.kinds))) for m in here
            ]
            self.marks.append(np.array(rows_M5, dtype=np.int32))
            count = (*count[:-1], int(private_tokens(self.marks[-1], len(ids)).sum()))
        if units:
            said = {fold(m.text)[0] for m in here}
            self.values += len(units)
            self.values_not_found += sum(said.isdisjoint(forms(text)) for text, _ in units)
        self.ids.append(ids)
        self.roles.append(roles)
        self.counts.append(count)
        self.hashes.append(hashed)
        self.sources.append(source)
        self.mark_counts.append(len(here))
        for note in set(encoded.notes):
            take_note(self.notes, note)

    def refuse(self, error: UserError, where: str) -> None:
        """A row that cannot be used. Numbers apart, equal reasons are one."""
        reason = str(error).removeprefix(f"{where}: ")
        reason = re.sub(r"\d+", "N", reason)
        self.bad[reason if reason in self.bad or len(self.bad) < MAX_REASONS else "other reasons"] += 1
        if len(self.first_bad) < FIRST_BAD:
            self.first_bad.append(str(error) if str(error).startswith(where) else f"{where}: {error}")

    def chunk(self, read: int) -> Chunk:
        """All that was added."""
        return Chunk(
            tokens=np.concatenate(self.ids) if self.ids else np.zeros(0, np.uint32),
            roles=np.concatenate(self.roles) if self.roles else np.zeros(0, np.uint8),
            lengths=np.array([len(p) for p in self.ids], dtype=np.int64),
            counts=np.array(self.counts, dtype=np.int32).reshape(-1, len(COUNTS)),
            hashes=np.array(self.hashes, dtype=np.uint64),
            sources=np.array(self.sources, dtype=np.int64),
            marks=np.concatenate(self.marks) if self.marks else np.zeros((0, MARK_FIELDS), np.int32),
            mark_counts=np.array(self.mark_counts, dtype=np.int64),
            kinds=list(self.kinds),
            read=read,
            dropped=self.dropped,
            bad=self.bad,
            first_bad=self.first_bad,
            notes=self.notes,
            truncated=self.truncated,
            marked_values=self.values,
            values_not_found=self.values_not_found,
        )


def take_note(notes: Counter[str], note: str, count: int = 1) -> None:
    """Count what was not used. Keys of rows may be any words: of many, the first are named."""
    notes[note if note in notes or len(notes) < MAX_REASONS else "other keys and columns"] += count


def encode_row(
    rows: Rows, i: int, tokenizer: Any, options: TokenOptions
) -> tuple[Conversation, list[EncodedPrompt], int]:
    """Row i, its samples before truncation, and the hash of its content.

    Raises:
        UserError: the row cannot be used at all (missing field, refused by the template); names the row.
    """
    try:
        conversation = rows.conversation(i)
        hashed = content_hash([conversation.messages, conversation.tools])
    except RecursionError:
        raise UserError(f"{rows.where(i)}: {TOO_DEEP}") from None
    try:
        ends, left = conversation.ends(options.answers)
        notes = (*conversation.ignored, *left)
        if options.private or options.private_own:
            if conversation.tools or any(m.keys() & {"tool_calls", "reasoning_content"} for m in conversation.messages):
                raise UserError("has tools, calls or thoughts, which data.private does not reach")
            private = finders(options.private, options.private_own)
            messages, units = with_surrogates(conversation.messages, conversation.private, i, private)
            conversation = replace(conversation, messages=messages, private=units)
        variables = json.loads(options.variables)
        samples = []
        for end in ends:
            encoded = encode_turns(
                tokenizer,
                conversation.messages[:end],
                template=options.template,
                variables=variables,
                date=options.date,
                tools=conversation.tools,
                spans=bool(conversation.private),
            )
            samples.append(replace(encoded, notes=(*notes, *encoded.notes)) if notes else encoded)
    except UserError as error:
        raise UserError(f"{rows.where(i)}: {error}") from None
    except RecursionError:
        raise UserError(f"{rows.where(i)}: {TOO_DEEP}") from None
    return conversation, samples, hashed


def tokenize_chunk(rows: Rows, tokenizer: Any, options: TokenOptions, start: int, stop: int) -> Chunk:
    """Tokenize rows start..stop-1; what cannot be used is counted.

    The hash of a sample is that of its row's content, so that the held-out samples of a data set are the same at every
    seq_len, behind every template and on every day, and all answers of a row are on one side.

    Raises:
        MarkError: a mark of a private value that is not in the text; names the row.
    """
    parts = Parts()
    for i in range(start, stop):
        try:
            conversation, samples, hashed = encode_row(rows, i, tokenizer, options)
        except MarkError:
            raise
        except UserError as error:
            parts.refuse(error, rows.where(i))
            continue
        for encoded in samples:
            parts.add(encoded, hashed, i, conversation.private, tokenizer, options)
    return parts.chunk(stop - start)


class Kept(Protocol):
    """Chunks that an earlier start has left, and where this one leaves its own (``data/begun.py``)."""

    def has(self, start: int, stop: int) -> bool: ...
    def read(self, start: int, stop: int) -> Chunk | None: ...
    def write(self, start: int, stop: int, chunk: Chunk) -> None: ...


def tokenize_rows(
    rows: Rows,
    tokenizer: Any,
    tokenizer_dir: str,
    options: TokenOptions,
    *,
    workers: int | None = None,
    kept: Kept | None = None,
) -> Iterator[Chunk]:
    """All rows as chunks, in order, holding a few chunks in memory at a time.

    ``workers`` processes; None: one per available core when there are many rows (``many``). Of ``kept`` chunks, those
    that are whole are taken as they are.

    Raises:
        UserError: as ``tokenize_chunk``; a process was killed.
        OSError: a chunk cannot be kept.
    """
    ranges = [(a, min(a + CHUNK_ROWS, len(rows))) for a in range(0, len(rows), CHUNK_ROWS)]
    missing = [bounds for bounds in ranges if kept is None or not kept.has(*bounds)]
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if many(rows, options) else 1
    if workers <= 1 or len(missing) <= 1:
        made: Generator[Chunk, None, None] = (tokenize_chunk(rows, tokenizer, options, *bounds) for bounds in missing)
    else:
        made = _by_processes(rows, tokenizer_dir, options, missing, workers)
    wanted = set(missing)
    with closing(made):
        for bounds in ranges:
            if bounds not in wanted and kept is not None and (found := kept.read(*bounds)) is not None:
                yield found
                continue
            chunk = next(made) if bounds in wanted else tokenize_chunk(rows, tokenizer, options, *bounds)
            if kept is not None:
                kept.write(*bounds, chunk)
            yield chunk


def many(rows: Rows, options: TokenOptions) -> bool:
    """So many rows that it pays to tokenize by processes, and to keep what is done."""
    return min(len(rows), options.max_samples or len(rows)) > PARALLEL_ROWS


def _by_processes(
    rows: Rows, tokenizer_dir: str, options: TokenOptions, ranges: list[tuple[int, int]], workers: int
) -> Generator[Chunk, None, None]:
    # Chunks in turn, so that they come in order.
    try:
        with told(workers, _work, rows, str(tokenizer_dir), options) as pipes:
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


def _work(pipe: Any, rows: Rows, tokenizer_dir: str, options: TokenOptions) -> None:
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
