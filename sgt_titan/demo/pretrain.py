"""Trains the demo's trunk from nothing: a byte-level BPE tokenizer and a 1.4M-parameter Llama on ``corpus``.

The result is an ordinary Hugging Face directory (``trunk/``), small enough to be shipped with the package, so that
training an SGT, exporting it and attacking it can be shown anywhere without a download.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sgt_titan.demo.corpus import conversations
from sgt_titan.errors import UserError

SPECIALS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCAB_SIZE = 2048
MAX_LENGTH = 512
TRAIN_SEED = 0
HELD_OUT_SEED = 1
TOKENIZER_ROWS = 20_000
IGNORED = -100

# Every turn ends in <|end|>, the assistant's also in </s> (the eos token), so that a conversation cut after any user
# turn and rendered with add_generation_prompt is a prefix of the whole conversation's text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Row = dict[str, Any]


def train_tokenizer(rows: Iterator[Row], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the rows' contents, with ``SPECIALS`` and the chat template.

    Digits are cut into pairs from the left of a group, so a card's last four digits are its last two tokens. A pair
    rarely occurs twice in a prompt, unlike a digit, so the token before tells which number is being copied. No token
    is added around a text: the template writes ``<s>`` itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for row in rows for m in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[s for s in SPECIALS if s.startswith("<|")],
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def trunk_config(vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """The shipped trunk's shape: 1.44M parameters with tied embeddings."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("</s>"),
        dtype="float32",
    )


def encode_row(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[bool]]:
    """Token ids of the rendered conversation, and which of them are answer tokens.

    Answer tokens are those of the assistant's messages and their ``<|end|>``; the ``</s>`` behind it says nothing.
    """
    ids = tokenizer.encode(tokenizer.apply_chat_template(row["messages"], tokenize=False), add_special_tokens=False)
    assistant, end = (tokenizer.convert_tokens_to_ids(s) for s in ("<|assistant|>", "<|end|>"))
    answers, inside = [], False
    for token in ids:
        answers.append(inside)
        if token == assistant:
            inside = True
        elif token == end:
            inside = False
    return ids, answers


def pad_batch(rows: Sequence[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids ``(B, T)`` int64 and answer mask ``(B, T)`` bool."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), pad)
    answers_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, (ids, answers) in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        answers_BT[i, : len(ids)] = torch.tensor(answers)
    return ids_BT, answers_BT


def batches(
    tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int, seed: int, window: int = 16
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``steps`` batches of rows never seen before; rows of similar length share a batch within a window of batches."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, steps, window):
        count = min(window, steps - first)
        rows = [encode_row(tokenizer, r) for r in conversations(count * batch_size, seed, first * batch_size)]
        rows.sort(key=lambda row: len(row[0]))
        for i in torch.randperm(count, generator=generator).tolist():
            yield pad_batch(rows[i * batch_size : (i + 1) * batch_size], tokenizer.pad_token_id)


def token_losses(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats ``(B, T - 1)`` of token ``t + 1`` given tokens ``0 .. t``; 0 where that token is padding.

    Padding is on the right, so causal attention alone keeps it from the real tokens.
    """
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    later_BT = ids_BT[:, 1:]
    pad: Any = model.config.pad_token_id
    targets_BT = later_BT.masked_fill(torch.eq(later_BT, pad), IGNORED)
    return F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORED, reduction="none")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warmup, then a cosine from ``peak`` to 2% of it at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def start_with_copying(model: LlamaForCausalLM) -> None:
    """Sets a few attention heads so that the untrained trunk already repeats what followed a token before.

    Copying from the prompt needs two heads in a row: one whose output is the previous token, and one that looks for
    the current token there and passes on the token it finds ("induction", arXiv 2209.11895). From random weights
    their discovery is a plateau of thousands of steps, longer than this trunk's whole training. So they are the
    start instead, and training keeps, sharpens or undoes them like any weight:

    * feature 0 of every embedding is one constant, and layer 0's first head makes of it a query and a key whose RoPE
      phases agree at distance 1; its value is a sketch of the token, written to a subspace of its own;
    * in the next three layers the first query head of each KV head compares that sketch with the current token's, on
      the slow RoPE planes only, and its value and output put the found token's embedding back.
    """
    config: Any = model.config  # Llama's, complete: what transformers calls optional is there
    head: int = config.head_dim
    width, half, group = config.hidden_size, head // 2, config.num_attention_heads // config.num_key_value_heads
    scale = 0.05
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    def sketch(rows: int) -> torch.Tensor:
        """Orthonormal rows ``(rows, D)`` that do not see feature 0."""
        random = torch.randn(width - 1, rows)
        return F.pad(torch.linalg.qr(random)[0].T, (1, 0))

    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=scale)
    embedding[:, 0] = 4 * scale
    # Token sketches are read with the first rows and written with the second: the two must not overlap.
    both = sketch(2 * head)
    read, write = both[:head], both[head:]

    # The normalised constant is close to 4; q . k / sqrt(head) then peaks at distance 1, about 6 above its neighbours.
    first, fast, strength = model.model.layers[0].self_attn, half * 3 // 8, math.sqrt(50) / 4
    first.q_proj.weight[:head] = 0
    first.k_proj.weight[:head] = 0
    first.q_proj.weight[:fast, 0] = strength
    first.k_proj.weight[:fast, 0] = strength * theta[:fast].cos()
    first.k_proj.weight[half : half + fast, 0] = strength * theta[:fast].sin()
    first.v_proj.weight[:head] = read
    first.o_proj.weight[:, :head] = 2 * scale * write.T

    slow = torch.cat([torch.arange(half * 9 // 16, half), torch.arange(half + half * 9 // 16, head)])
    for layer in model.model.layers[1:4]:
        attention = layer.self_attn
        for kv in range(config.num_key_value_heads):
            q, k = kv * group * head, kv * head
            chosen = torch.randperm(head)[: len(slow)]
            attention.q_proj.weight[q : q + head] = 0
            attention.k_proj.weight[k : k + head] = 0
            attention.q_proj.weight[q + slow] = 3.0 * read[chosen]
            attention.k_proj.weight[k + slow] = 3.0 * write[chosen]
            value = sketch(head)
            attention.v_proj.weight[k : k + head] = value
            attention.o_proj.weight[:, q : q + head] = 3 * scale * value.T


def train(
    tokenizer: PreTrainedTokenizerFast,
    config: LlamaConfig,
    *,
    steps: int,
    batch_size: int,
    peak_lr: float,
    prompt_weight: float,
    seed: int,
    compile: bool = False,
) -> LlamaForCausalLM:
    """Trains a trunk from random weights on rows of ``seed``; float32, deterministic on one machine and thread count.

    Prompt tokens count ``prompt_weight`` of an answer token: most of a prompt is random names and digits, whose
    gradient is noise, while the answers are where copying is learned.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    start_with_copying(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-9
    )
    losses_of = torch.compile(token_losses, dynamic=True) if compile else token_losses
    model.train()
    began, answer_ema = time.monotonic(), None
    for step, (ids_BT, answers_BT) in enumerate(batches(tokenizer, steps, batch_size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        losses = losses_of(model, ids_BT)
        answers, real = answers_BT[:, 1:], ids_BT[:, 1:] != tokenizer.pad_token_id
        weights = torch.where(answers, 1.0, prompt_weight) * real
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == steps - 1:
            answer = (losses.detach() * answers).sum().item() / answers.sum().item()
            answer_ema = answer if answer_ema is None else 0.8 * answer_ema + 0.2 * answer
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            line = (
                f"step {step + 1}/{steps} loss {loss.item():.3f} answer {answer_ema:.3f} {spent:.0f}s left {left:.0f}s"
            )
            print(line, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)
    return model.eval()


def ngram_nats(
    train_rows: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], vocab_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Nats per token, ``(T - 1,)`` a row, of a unigram and of a bigram model counted on ``train_rows``.

    Both score every token of a row but its first. Both are add-one smoothed, which costs the bigram something.
    """
    unigram_V = torch.ones(vocab_size, dtype=torch.float64)
    bigram_VV = torch.ones(vocab_size, vocab_size, dtype=torch.float64)
    for ids in train_rows:
        row = torch.tensor(ids)
        unigram_V += torch.bincount(row[1:], minlength=vocab_size)
        bigram_VV.index_put_((row[:-1], row[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    unigram_V = -(unigram_V / unigram_V.sum()).log()
    bigram_VV = -(bigram_VV / bigram_VV.sum(1, keepdim=True)).log()
    scored = [torch.tensor(ids) for ids in rows]
    return [unigram_V[r[1:]] for r in scored], [bigram_VV[r[:-1], r[1:]] for r in scored]


@torch.no_grad()
def perplexities(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: int,
    train_rows: int = 5000,
    seed: int = HELD_OUT_SEED,
    train_seed: int = TRAIN_SEED,
) -> dict[str, dict[str, float]]:
    """Perplexity of trunk, unigram and bigram on the first ``rows`` rows of ``seed``.

    Returns ``{"trunk" | "unigram" | "bigram": {"all", "answers"}, "tokens": {"all", "answers"}}``. ``all`` is every
    token after ``<s>``; ``answers`` is what ``encode_row`` calls answer tokens. The n-gram models are counted on
    ``train_rows`` rows of the training seed.
    """
    held_out = [encode_row(tokenizer, r) for r in conversations(rows, seed)]
    counted = [encode_row(tokenizer, r)[0] for r in conversations(train_rows, train_seed)]
    unigram, bigram = ngram_nats(counted, [ids for ids, _ in held_out], len(tokenizer))
    trunk = []
    for i in range(0, rows, 32):
        chunk = held_out[i : i + 32]
        losses = token_losses(model, pad_batch(chunk, tokenizer.pad_token_id)[0]).double()
        trunk += [losses[j, : len(ids) - 1] for j, (ids, _) in enumerate(chunk)]
    answers = torch.cat([torch.tensor(mask[1:]) for _, mask in held_out])
    result = {"tokens": {"all": float(len(answers)), "answers": float(answers.sum())}}
    for name, nats in (("trunk", trunk), ("bigram", bigram), ("unigram", unigram)):
        flat = torch.cat(nats)
        result[name] = {"all": flat.mean().exp().item(), "answers": flat[answers].mean().exp().item()}
    return result


@torch.no_grad()
def copy_rates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, rows: int, seed: int = HELD_OUT_SEED
) -> dict[str, tuple[int, int]]:
    """How often greedy answers repeat the private values they should, as ``{kind: (copied, due)}``.

    Generates the last answer of each of the first ``rows`` rows of ``seed`` from the true conversation before it. A
    value is due when the reference answer contains it, and copied when the generated answer contains it verbatim
    (a card's value in an answer is its last four digits). ``exact`` counts whole answers equal to the reference;
    the reference picks one of several phrasings at random, so it cannot come near 100%.
    """
    chats = list(conversations(rows, seed))
    counts: dict[str, list[int]] = {}
    generates: Any = model  # transformers' mixin asks for a protocol that its own models do not declare
    for i in range(0, rows, 32):
        chunk = chats[i : i + 32]
        prompts = [
            tokenizer.apply_chat_template(c["messages"][:-1], tokenize=False, add_generation_prompt=True) for c in chunk
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        out = generates.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=80,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for chat, answer in zip(chunk, answers, strict=True):
            last = len(chat["messages"]) - 1
            due = {(s["kind"], s["text"]) for s in chat["spans"] if s["message"] == last}
            results = [(kind, text in answer) for kind, text in sorted(due)]
            results.append(("exact", answer == chat["messages"][-1]["content"]))
            for kind, copied in results:
                count = counts.setdefault(kind, [0, 0])
                count[0] += copied
                count[1] += 1
    return {kind: (copied, due) for kind, (copied, due) in sorted(counts.items())}


def load(directory: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trunk (float32, eval mode) and tokenizer of a directory written by ``main``.

    Raises:
        UserError: the directory holds no trunk.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no config.json; give a directory written by python -m sgt_titan.demo.pretrain")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    return model.eval(), tokenizer


def evaluate(directory: Path, rows: int) -> dict[str, Any]:
    """Held-out perplexities and copy rates of a shipped trunk, as JSON-ready numbers."""
    model, tokenizer = load(directory)
    rates = copy_rates(model, tokenizer, rows=rows)
    return {
        "rows": rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": perplexities(model, tokenizer, rows=rows),
        "copied": {k: {"copied": c, "due": n, "rate": round(c / n, 4)} for k, (c, n) in rates.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m sgt_titan.demo.pretrain``: trains into ``--out``, or measures ``--evaluate DIR`` again."""
    parser = argparse.ArgumentParser(prog="python -m sgt_titan.demo.pretrain", description="Train the demo trunk.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="directory to write the trunk to")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="print a trunk's held-out numbers as JSON")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--prompt-weight", type=float, default=0.3, help="weight of a prompt token's loss")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="of weights and rows; the held-out seed is 1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    parser.add_argument("--rows", type=int, default=600, help="held-out rows measured by --evaluate")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        if args.evaluate:
            print(json.dumps(evaluate(args.evaluate, args.rows), indent=2))
            return 0
        if args.seed == HELD_OUT_SEED:
            raise UserError(f"--seed: {HELD_OUT_SEED} is the held-out rows' seed; use another")
        if args.steps < 1 or args.batch_size < 1 or args.rows < 1:
            raise UserError("--steps, --batch-size and --rows must be at least 1")
        began = time.monotonic()
        tokenizer = train_tokenizer(conversations(TOKENIZER_ROWS, args.seed))
        model = train(
            tokenizer,
            trunk_config(len(tokenizer)),
            steps=args.steps,
            batch_size=args.batch_size,
            peak_lr=args.lr,
            prompt_weight=args.prompt_weight,
            seed=args.seed,
            compile=args.compile,
        )
        model.generation_config.max_new_tokens = 80
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        print(f"\nwrote {args.out} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
