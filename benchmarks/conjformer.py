"""The tables of docs/CONJFORMER.md: equivalence, cost, perplexity and every attack, on a trunk and converted servers.

    python benchmarks/conjformer.py equivalence TRUNK SERVER CLIENT SECRET [--tokens 4096]
    python benchmarks/conjformer.py perplexity MODEL... --data tinystories
    python benchmarks/conjformer.py attacks --export EXPORT --trunk TRUNK --data tinystories [--out FILE] \
        --server NAME=SERVER,CLIENT,SECRET ... [--sgt] [--own MODEL] [--wire bfloat16] [--only a,b] [--rows 32]
    python benchmarks/conjformer.py gains MODEL...            # how much the gains of each norm differ
    python benchmarks/conjformer.py between --trunk TRUNK --export EXPORT --data tinystories
                    # perplexity with scalar norms whose linears have made up a part of what averaging the gains took

    python benchmarks/conjformer.py gpt2 OUT --steps 400      # a GPT-2 pretrained on the demo corpus, to convert

EXPORT names the rows under attack and, with ``--sgt``, what is rotated. The attacks are the battery's own. With --own
the attacker has a model that he drifted himself, by the same recipe, in the place of the public one: its table, its
weights, and what he trains on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_out, written
from benchmarks.timing import machine
from sgt_titan.config.origin import trunk_directory
from sgt_titan.conjformer.client import Client
from sgt_titan.conjformer.families import FAMILIES
from sgt_titan.conjformer.secret import load
from sgt_titan.demo import TRUNK
from sgt_titan.evaluation.attacks import ATTACKS, ROTATION
from sgt_titan.evaluation.measure.setting import load_setting
from sgt_titan.evaluation.scores import recovery
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import learned, nothing
from sgt_titan.evaluation.world.rotated import load_rotation
from sgt_titan.evaluation.world.samples import data_config, load_trunk
from sgt_titan.evaluation.world.threat import Guess
from sgt_titan.transform.trunk_files import TrunkFiles

TABLE = {name: ATTACKS[name] for name in ("nearest_l2", "nearest_cosine", "known_plaintext", "inverter")} | ROTATION


def model_of(path: str, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(trunk_directory(path), dtype=dtype, local_files_only=True).eval()


@torch.no_grad()
def equivalence(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    client = Client.load(arguments.client, load(Path(arguments.secret)))
    plain = model_of(arguments.trunk)
    tokens_1T = torch.randint(3, plain.config.vocab_size, (1, arguments.tokens), generator=torch.manual_seed(0))
    truth_TV = plain(input_ids=tokens_1T).logits[0]
    print(f"{arguments.tokens} tokens, {plain.config.num_hidden_layers} layers, logit std {truth_TV.std():.2f}")
    for name, server_type in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        server = model_of(arguments.server, server_type)
        out = server(inputs_embeds=client.encode(tokens_1T).to(server_type)).logits.float()
        served_TV = client.decode(out)[0]
        alone_TV = model_of(arguments.trunk, server_type)(input_ids=tokens_1T).logits[0].float()
        for label, logits_TV in (("rotated", served_TV), ("plain model in that type", alone_TV)):
            error = (logits_TV - truth_TV).abs()
            kl = torch.nn.functional.kl_div(
                logits_TV.log_softmax(-1), truth_TV.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
            same = (logits_TV.argmax(-1) == truth_TV.argmax(-1)).double().mean()
            print(
                f"{name:>9} {label:<26} max {error.max():.2e}  mean {error.mean():.2e}  KL {kl.mean():.2e} nats  "
                f"same top-1 {same:.4%}"
            )


@torch.no_grad()
def perplexity(arguments: argparse.Namespace) -> None:
    """Over all tokens of the held-out rows."""
    setting = _setting(arguments)
    for path in arguments.models:
        nats, count = held_out(model_of(path), setting.full_batches)
        print(f"{path}: perplexity {math.exp(nats):.3f}, {nats:.4f} nats, N = {count}", flush=True)


@torch.no_grad()
def held_out(model, batches) -> tuple[float, int]:
    """Nats a token of the next one, over the tokens of all rows, and how many these are."""
    nats, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long()).logits[:, :-1].float()
        keep = batch.valid_BT[:, 1:]
        nats += torch.nn.functional.cross_entropy(logits[keep], batch.tokens_BT[:, 1:][keep], reduction="sum").item()
        count += int(keep.sum())
    return nats / count, count


@torch.no_grad()
def between(arguments: argparse.Namespace) -> None:
    """Every gain is its mean, and the linears behind are times (g / mean)^s: 0 the averaged gains, 1 the exact fold.
    Llama's names."""
    setting = _setting(arguments)
    original = math.exp(held_out(setting.trunk, setting.full_batches)[0])
    with written(arguments.out, machine()) as tables:
        tables.start("", {"made up of what averaging took": ".0%", "perplexity": ".3f", "above the original": "+.1%"})
        for share in (0.0, 0.5, 0.75, 0.9, 0.95, 1.0):
            model = model_of(arguments.trunk)
            family = FAMILIES[model.config.model_type]
            for layer in model.base_model.layers:
                for norm in family.norms:
                    gain_D = layer.get_submodule(norm).weight
                    for module, rule in family.linears.items():
                        if rule.norm == norm:
                            layer.get_submodule(module).weight.mul_((gain_D / gain_D.mean()).abs() ** share)
                    gain_D.fill_(gain_D.mean())
            found = math.exp(held_out(model, setting.full_batches)[0])
            tables.row(share, found, found / original - 1)


def attacks(arguments: argparse.Namespace) -> None:
    """Top-1 and top-10 of every attack on every server, and what known pairs give away."""
    setting = _setting(arguments)
    before = learned(setting.transform) if arguments.sgt else nothing()
    frequent = recovery.frequent_tokens(setting.corpus)
    only = arguments.only.split(",") if arguments.only else list(TABLE)
    worlds = {}
    known = load_trunk(arguments.own, torch.device("cpu")) if arguments.own else setting.trunk
    for entry in arguments.server:
        name, _, paths = entry.partition("=")
        mechanism = load_rotation(
            before,
            *paths.split(","),
            arguments.own or trunk_directory(arguments.trunk),
            wire=getattr(torch, arguments.wire),
            own=bool(arguments.own),
        )
        worlds[name] = World(setting.prompts, setting.corpus, mechanism, known, arguments.seed)
    if arguments.bare:
        worlds["not rotated"] = World(setting.prompts, setting.corpus, before, setting.trunk, arguments.seed)
    first = next(iter(worlds.values()))
    print(f"{len(first.rows)} prompts, N = {len(first.truth_N)} hidden tokens, D = {first.size.width}", file=sys.stderr)
    found: dict[tuple[str, str], tuple[float, float]] = {}
    curves: dict[str, dict[float, float]] = {name: {} for name in worlds}
    for name, world in worlds.items():
        for key in only:
            if world.mechanism.rotation is None and key in ROTATION:
                continue
            started = time.monotonic()
            guess = attacked(key, world, arguments.steps)
            scores = recovery.score(guess.top_NK, world, setting.tokenizer, frequent=frequent)
            found[name, key] = scores["top1"]["value"], scores["top10"]["value"]
            if key == "procrustes":
                values = [recovery.top1_estimate(top_N, world).value for top_N in guess.curve.top_N]
                curves[name] = dict(zip(guess.curve.at, values, strict=True))
            said = f"{time.monotonic() - started:.0f} s; {'; '.join(guess.notes)[:150]}"
            print(f"{name} {key}: top-1 {found[name, key][0]:.2%}; {said}", file=sys.stderr, flush=True)
    with written(arguments.out, machine()) as tables:
        tables.start("", {"attack": ""} | {f"{name}, {top}": ".1%" for name in worlds for top in ("top-1", "top-10")})
        for key in only:
            cells = [found.get((name, key), (None, None)) for name in worlds]
            tables.row(TABLE[key].title, *(value for pair in cells for value in pair))
        if counts := sorted({at for curve in curves.values() for at in curve}):
            tables.start("Procrustes", {"known pairs": ",.0f"} | {name: ".1%" for name in worlds})
            for at in counts:
                tables.row(at, *(curve.get(at) for curve in curves.values()))


def attacked(key: str, world: World, steps: int | None = None) -> Guess:
    """What an attack of ``TABLE`` reads, with the quick suite's effort; steps: of those that learn."""
    run = TABLE[key].run
    effort = TABLE[key].arguments("quick") or {}
    return run(**world.granted(run), **effort | ({"steps": steps} if "steps" in effort and steps else {}))


def gains(arguments: argparse.Namespace) -> None:
    """Std over mean of each norm's gains: 0 is a scalar norm."""
    for path in arguments.models:
        files = TrunkFiles(trunk_directory(path))
        for name in sorted(name for name in files.entries if "norm" in name or ".ln_" in name):
            gain = files.read(name).double()
            if name.endswith("weight"):
                print(f"{name:<52} std/mean {gain.std() / gain.mean():.3f}  {gain.min():.2f} to {gain.max():.2f}")


def gpt2(arguments: argparse.Namespace) -> None:
    """Pretrain a small GPT-2 on the demo corpus; its norms learn ten times as fast, so that their gains differ as those
    of a long pretraining do."""
    import shutil
    from pathlib import Path

    from transformers import GPT2Config, GPT2LMHeadModel

    from sgt_titan.config.resolve import resolve
    from sgt_titan.config.schema import Config
    from sgt_titan.data.cache import prepare
    from sgt_titan.data.order import samples_at
    from sgt_titan.trunk.tokenizer_files import tokenizer_files

    config = Config()
    config.trunk.path, config.data.source, config.training.seq_len = "demo", "demo", 128
    config.data.max_samples, config.data.truncation, config.run.output_dir = 6000, "drop", str(arguments.out)
    config = resolve(config, world_size=None)
    view = prepare(config, config.trunk.path, progress=False).train
    torch.manual_seed(0)
    shape = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 2048}
    zero = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **zero, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True))
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[".ln_" in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[False], "lr": 2e-3}, {"params": groups[True], "lr": 2e-2}])
    for step in range(arguments.steps):
        _, rows = samples_at(np.arange(16 * step, 16 * step + 16), len(view), 0)
        ids = [torch.from_numpy(view.tokens(int(row)).astype("int64")) for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        loss = model(input_ids=labels.clamp_min(0), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, (2e-3, 2e-2), strict=True):
            group["lr"] = peak * min(1, (step + 1) / 20) * (1 - 0.9 * step / arguments.steps)
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    gains = torch.cat([p.detach() for n, p in model.named_parameters() if ".ln_" in n and n.endswith("weight")])
    print(f"gains: mean {gains.mean():.3f}, std {gains.std():.3f}")
    model.save_pretrained(arguments.out)
    for file in tokenizer_files(Path(TRUNK)):
        shutil.copyfile(file, Path(arguments.out) / file.name)


def _setting(arguments: argparse.Namespace):
    config = data_config(arguments.export, arguments.trunk, arguments.data, [])
    return load_setting(arguments.export, config, rows=arguments.rows, corpus=arguments.corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("equivalence")
    for name in ("trunk", "server", "client", "secret"):
        one.add_argument(name)
    one.add_argument("--tokens", type=int, default=4096)
    two = parts.add_parser("perplexity")
    two.add_argument("models", nargs="+")
    three = parts.add_parser("attacks")
    three.add_argument("--server", action="append", default=[])
    three.add_argument("--sgt", action="store_true")
    three.add_argument("--bare", action="store_true", help="also without a rotation")
    three.add_argument("--own", default="", help="a drifted model of the attacker's own")
    three.add_argument("--steps", type=int, help="of the learned attacks (default: as the quick suite)")
    three.add_argument("--wire", default="float32")
    three.add_argument("--only", default="")
    three.add_argument("--seed", type=int, default=0)
    add_out(three)
    five = parts.add_parser("gains")
    five.add_argument("models", nargs="+")
    six = parts.add_parser("between")
    add_out(six)
    four = parts.add_parser("gpt2")
    four.add_argument("out")
    four.add_argument("--steps", type=int, default=400)
    for sub in (two, three, six):
        sub.add_argument("--export", required=True)
        sub.add_argument("--trunk", required=True)
        sub.add_argument("--data", required=True)
        sub.add_argument("--rows", type=int, default=32)
        sub.add_argument("--corpus", type=int, default=2000)
    arguments = parser.parse_args()
    disable_progress_bar()
    run = {f.__name__: f for f in (equivalence, perplexity, between, attacks, gains, gpt2)}[arguments.part]
    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
