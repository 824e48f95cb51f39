"""What the client adds to a prompt, in one run: ``python benchmarks/serving.py [--export DIR --trunk DIR]``.

    encode      tokenize, obfuscate, serialise, against sending the text: time, bytes, tokens a second, by T and batch
    denoiser    2 layers of it against none: time and bytes
    held        noise that is held against fresh noise
    weights     bfloat16 and int8 weights: time, memory, and what they do to mean and std
    proxy       the same requests to a stub vLLM directly and through the proxy: time to first token and to the end

``encode`` and ``weights`` use an untrained transform of the shape given by --layers and --width: times do not depend on
the numbers in it. ``weights`` is also measured on --export, where there are trained numbers to distort. A few minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, machine
from sgt_titan.client import Options, StainedGlassTransform
from sgt_titan.client.wire import WIRES, serialise

DEMO = Path(__file__).resolve().parents[1] / "sgt_titan" / "demo" / "trunk"
WORDS = "the quick brown fox reads a long letter from the bank about account 4411 and asks who sent it "


def untrained(width: int, layers: int, heads: int, denoiser: int = 0) -> Path:
    """An export of a Llama-shaped transform with the demo trunk's tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config, write_export
    from sgt_titan.transform.configuration import needed_version

    vocab = len(AutoTokenizer.from_pretrained(DEMO))
    trunk = AutoConfig.for_model(
        "llama", vocab_size=vocab, hidden_size=width, intermediate_size=int(3.5 * width), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), max_position_embeddings=8192,
    )  # fmt: skip
    config = SGTConfig(
        trunk_config=estimator_config(trunk, layers), hidden_size=width, vocab_size=vocab, scale=0.02, std_init=1.0,
        denoiser_layers=denoiser,
    )  # fmt: skip
    config.format_version = needed_version(config)
    torch.manual_seed(0)
    state = ExportedTransform(config).state_dict()
    out = Path(tempfile.mkdtemp()) / "export"
    return write_export(out, config, state, tokenizer_dir=DEMO, summary={})


def prompt_of(sgt: StainedGlassTransform, tokens: int) -> str:
    """Text of about that many tokens."""
    ids = sgt.tokenizer(WORDS * (tokens // 10 + 1), add_special_tokens=False)["input_ids"][: tokens - 1]
    return sgt.tokenizer.decode(ids)


def encode(sgt: StainedGlassTransform) -> None:
    width = sgt.config.hidden_size
    print(f"\nencode: {sgt.config.trunk_config['num_hidden_layers']} layers of width {width}, float32")
    print(f"{'T':>6}{'tokenize ms':>13}{'obfuscate ms':>14}{'serialise ms':>14}{'tokens/s':>10}", end="")
    print(f"{'text ms':>9}{'bytes/token fp32':>18}{'bf16':>8}{'text':>7}")
    for T in (16, 64, 256, 1024):
        text = prompt_of(sgt, T)
        prompt = sgt.prompt(text)
        embeds_TD = sgt.encode(prompt)
        times = compare(
            {
                "tokenize": lambda t=text: sgt.prompt(t),
                "obfuscate": lambda p=prompt: sgt.encode(p),
                "serialise": lambda e=embeds_TD: json.dumps(WIRES["vllm"].body(e, Options(), "m")).encode(),
                "text": lambda t=text: json.dumps({"model": "m", "prompt": t, "max_tokens": 256}).encode(),
            },
            5,
        )
        total = sum(times[k].median for k in ("tokenize", "obfuscate", "serialise"))
        n = len(prompt)
        sizes = [len(serialise(e)) / n for e in (embeds_TD, embeds_TD.bfloat16())]
        print(
            f"{n:>6}{1e3 * times['tokenize'].median:>13.2f}{1e3 * times['obfuscate'].median:>14.1f}"
            f"{1e3 * times['serialise'].median:>14.2f}{n / total:>10.0f}{1e3 * times['text'].median:>9.3f}"
            f"{sizes[0]:>18.0f}{sizes[1]:>8.0f}{len(text.encode()) / n:>7.1f}"
        )
    embeds_TD = sgt.encode(prompt_of(sgt, 256))
    body = len(json.dumps(WIRES["sglang"].body(embeds_TD, Options(), None)))
    print(f"SGLang's nested floats: {body / len(embeds_TD):.0f} bytes a token")
    print(f"\nbatch: T 128, one pass\n{'B':>6}{'seconds':>10}{'tokens/s':>10}")
    for B in (1, 4, 16):
        prompts = [sgt.prompt(prompt_of(sgt, 128)) for _ in range(B)]
        seconds = compare({"b": lambda p=prompts: sgt.encode_batch(p)}, 3)["b"].median
        print(f"{B:>6}{seconds:>10.3f}{sum(map(len, prompts)) / seconds:>10.0f}")


def denoiser(plain: Path, cleaned: Path) -> None:
    """What the client pays for cleaning up: both obfuscate the same prompts, in one run."""
    sgt = {name: StainedGlassTransform.from_pretrained(path) for name, path in (("none", plain), ("2", cleaned))}
    print(f"\ndenoiser\n{'T':>6}{'none ms':>10}{'2 layers ms':>13}{'ratio':>8}{'bytes none':>12}{'2 layers':>10}")
    for T in (64, 256, 1024):
        prompt = {name: one.prompt(prompt_of(one, T)) for name, one in sgt.items()}
        times = compare({name: lambda one=sgt[name], p=prompt[name]: one.encode(p) for name in sgt}, 7)
        size = {name: len(json.dumps(WIRES["vllm"].body(one.encode(prompt[name]), Options(), "m")))
                for name, one in sgt.items()}  # fmt: skip
        none, two = times["none"].median, times["2"].median
        print(f"{T:>6}{1e3 * none:>10.1f}{1e3 * two:>13.1f}{two / none:>8.2f}{size['none']:>12}{size['2']:>10}")


def held(path: Path) -> None:
    sgt = {h: StainedGlassTransform.from_pretrained(path, hold_noise=h) for h in (False, True)}
    prompt = sgt[True].prompt(prompt_of(sgt[True], 512))
    times = compare({"fresh": lambda: sgt[False]._noise(prompt, None), "held": lambda: sgt[True]._noise(prompt, None)})
    print(
        f"\nheld: noise of {len(prompt)} tokens, fresh {1e3 * times['fresh'].median:.1f} ms, "
        f"held {1e3 * times['held'].median:.1f} ms"
    )


@torch.no_grad()
def weights(path: Path, texts: list[str], name: str, trained: bool) -> None:
    print(f"\nweights: {name}; {len(texts)} prompts; errors at hidden positions, in units of sigma")
    print(
        f"{'weights':>10}{'MB':>7}{'ms':>8}{'|d mean| mean':>15}{'max':>8}{'sigma ratio mean':>18}{'min':>8}{'max':>8}"
    )
    exact = None
    for kind in ("float32", "bfloat16", "int8"):
        sgt = StainedGlassTransform.from_pretrained(path, weights=kind)
        prompts = [sgt.prompt(text) for text in texts]
        outs = []
        for prompt in prompts:
            out = sgt(input_ids=torch.tensor([prompt.ids]))
            mask = torch.from_numpy(prompt.mask)
            outs.append((out.mean_BTD[0][mask].float(), out.log_std_BTD[0][mask].float()))
        mean, log_std = (torch.cat(parts) for parts in zip(*outs, strict=True))
        exact = exact or (mean, log_std)
        shift = (mean - exact[0]).abs() / exact[1].exp()
        ratio = (log_std - exact[1]).exp()
        seconds = compare({"e": lambda s=sgt, p=prompts[0]: s.encode(p)}, 3)["e"].median
        tensors = [t for m in (sgt.bodies, sgt.mean_head, sgt.log_std_head) for t in (*m.parameters(), *m.buffers())]
        size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
        print(f"{kind:>10}{size:>7.1f}{1e3 * seconds:>8.1f}", end="")
        errors = f"{shift.mean():>15.4f}{shift.max():>8.3f}{ratio.mean():>18.4f}{ratio.min():>8.3f}{ratio.max():>8.3f}"
        print(errors if trained else "")  # an untrained transform's heads are zero: nothing to distort


def proxy(export: Path, trunk_dir: Path) -> None:
    import httpx
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sgt_titan.serving.app import create_app
    from sgt_titan.serving.settings import Settings
    from tests.stub_servers import Trunk, running, vllm_app

    model, tokenizer = AutoModelForCausalLM.from_pretrained(trunk_dir), AutoTokenizer.from_pretrained(trunk_dir)
    trunk = Trunk(model.eval(), tokenizer, context=512)
    sgt = StainedGlassTransform.from_pretrained(export)
    print("\nproxy: 16 tokens answered; to the stub directly (embeddings ready) / through the proxy (text in)")
    print(f"{'T':>6}{'first token ms':>16}{'proxy':>8}{'whole ms':>10}{'proxy':>8}{'added ms':>10}")
    with running(vllm_app(trunk)) as upstream, running(create_app(Settings(upstream), sgt)) as url:
        for T in (16, 128, 384):
            text = prompt_of(sgt, T)
            direct = WIRES["vllm"].body(sgt.encode(text), Options(max_tokens=16, temperature=0.0), "trunk")
            asked = {"model": "trunk", "prompt": text, "max_tokens": 16, "temperature": 0, "stream": True}
            seconds = {"direct": [], "proxy": []}
            with httpx.Client(timeout=60) as client:
                for _ in range(8):
                    for name, base, body in (("direct", upstream, direct), ("proxy", url, asked)):
                        started, first = time.perf_counter(), None
                        with client.stream("POST", base + "/v1/completions", json=body) as response:
                            for _ in response.iter_bytes():
                                first = first or time.perf_counter() - started
                        seconds[name].append((first, time.perf_counter() - started))
            a, b = ([statistics.median(x) for x in zip(*seconds[name][1:], strict=True)] for name in seconds)
            print(f"{T:>6}{1e3 * a[0]:>16.1f}{1e3 * b[0]:>8.1f}{1e3 * a[1]:>10.1f}{1e3 * b[1]:>8.1f}", end="")
            print(f"{1e3 * (b[1] - a[1]):>10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="a trained export, for weights and proxy")
    parser.add_argument("--trunk", type=Path, help="its trunk")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore")
    print(machine())
    path = untrained(arguments.width, arguments.layers, arguments.width // 64)
    encode(StainedGlassTransform.from_pretrained(path))
    denoiser(path, untrained(arguments.width, arguments.layers, arguments.width // 64, denoiser=2))
    held(path)
    if arguments.export:
        start = "One day a little girl named Lily found a box in the garden. She wanted to open it but it was too"
        weights(
            arguments.export,
            [start, WORDS * 4, "Tom and his dog went to the park to play with a big red ball"],
            "--export",
            True,
        )
    weights(path, [WORDS * 10], "untrained: time and memory only", False)
    if arguments.export and arguments.trunk:
        proxy(arguments.export, arguments.trunk)


if __name__ == "__main__":
    main()
