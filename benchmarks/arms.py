"""Ways to make one training step of the same shapes: a line of the benchmark each.

Random weights and tokens; every arm computes teacher, student, estimator, losses, gradients and an AdamW step of what
it trains. A row is half prompt (obfuscated), and every position's next-token distribution has to survive.

Shape suffixes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn


def allow_older_torch() -> None:
    """What torch 2.11 lacks: placeholders for names that one process does not use (torchtitan 0.3.0 and our sharding
    import them; calling one is an error), and a float8 product that it can compile.
    """
    import torch.distributed.fsdp as fsdp
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_init

    wanted: list[tuple[ModuleType, str]] = [
        (fsdp, "DataParallelMeshDims"),
        (_fsdp_common, "ShardPlacementResult"),
        (_fsdp_init, "_get_mesh_info"),
    ]
    for module, name in wanted:
        if not hasattr(module, name):
            setattr(module, name, type(name, (), {}))
    if torch.__version__ < "2.13":
        F.scaled_mm = _scaled_mm


def _scaled_mm(a, b, scale_a, _recipe_a, scale_b, _recipe_b, *, output_dtype, use_fast_accum):
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=output_dtype, use_fast_accum=use_fast_accum
    )


@dataclass(frozen=True)
class Size:
    """Shapes of a Llama and of a step."""

    width: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    length: int
    tied: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def hf(self):
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            intermediate_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=max(2048, self.length),
            tie_word_embeddings=self.tied,
            attn_implementation="sdpa",
        )


CPU = Size(width=256, layers=4, hidden=688, heads=4, kv_heads=2, vocab=32_000, rows=2, length=256)
LLAMA_1B = Size(2048, 16, 8192, 32, 8, 128_256, rows=4, length=2048, tied=True, dtype=torch.bfloat16)
LLAMA_8B = Size(4096, 32, 14336, 32, 8, 128_256, rows=2, length=2048, dtype=torch.bfloat16)
ESTIMATOR_LAYERS = 2
WEIGHTS = {"mi": 0.1, "abs_cos": 1.0, "norm": 1.0}


@dataclass
class Arm:
    """One way, ready to run: ``step()`` is a training step, ``flops`` the work of its matrix products."""

    step: Callable[[], None]
    flops: float
    model: nn.Module | None = None  # of (b)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch(size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, which of them are obfuscated, and where utility counts: (B, T) each."""
    tokens_BT = torch.randint(size.vocab, (size.rows, size.length), device=device())
    at_T = torch.arange(size.length, device=device())
    obfuscate_BT = ((at_T > 0) & (at_T < size.length // 2)).expand(size.rows, -1)
    return tokens_BT, obfuscate_BT, (at_T < size.length - 1).expand(size.rows, -1)


# -- (a) what one writes in an afternoon -------------------------------------------------------------------------------


class NaiveSGT(nn.Module):
    """A transformers model called twice, and an estimator of its layers."""

    def __init__(self, size: Size):
        super().__init__()
        from transformers import LlamaForCausalLM, LlamaModel

        hf, body = size.hf(), size.hf()
        body.num_hidden_layers, body.vocab_size, body.tie_word_embeddings = ESTIMATOR_LAYERS, 1, False
        self.trunk = LlamaForCausalLM(hf).to(size.dtype).requires_grad_(False).eval()
        self.body = LlamaModel(body)
        self.body.embed_tokens = None
        self.mean, self.log_std = nn.Linear(size.width, size.width), nn.Linear(size.width, size.width)
        self.dtype = size.dtype

    def forward(self, tokens_BT, obfuscate_BT):
        x_BTD = self.trunk.get_input_embeddings()(tokens_BT)
        with torch.autocast(x_BTD.device.type, self.dtype, enabled=self.dtype != torch.float32):
            h_BTD = self.body(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
            mean_BTD, log_std_BTD = self.mean(h_BTD).float(), self.log_std(h_BTD).float().clamp(-6, 2)
        x_BTD = x_BTD.float()
        noisy_BTD = x_BTD + mean_BTD + log_std_BTD.exp() * torch.randn_like(x_BTD)
        x_tilde_BTD = torch.where(obfuscate_BT[..., None], noisy_BTD, x_BTD)
        with torch.no_grad():
            teacher_BTV = self.trunk(tokens_BT, use_cache=False).logits
        student_BTV = self.trunk(inputs_embeds=x_tilde_BTD.to(self.dtype), use_cache=False).logits
        return x_BTD, mean_BTD, log_std_BTD, x_tilde_BTD, teacher_BTV, student_BTV


def naive(size: Size) -> Arm:
    """Two forwards of a transformers model, whole logits, all pairs of the MI term at once."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = NaiveSGT(size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens_BT, obfuscate_BT, utility_BT = batch(size)

    def step() -> None:
        x, mean, log_std, x_tilde, teacher, student = model(tokens_BT, obfuscate_BT)
        utility = F.cross_entropy(student[utility_BT].float(), teacher[utility_BT].float().softmax(-1))
        # (B, B, T, D): every x against every y.
        center, y_log_std = x + mean, log_std
        z = (x_tilde[:, None] - center[None]) * torch.exp(-y_log_std)[None]
        pairs_BB = (0.5 * z**2 + y_log_std[None] - log_std[:, None])[:, :, obfuscate_BT[0]].mean((-1, -2))
        mi = pairs_BB[~torch.eye(size.rows, dtype=torch.bool, device=pairs_BB.device)].mean()
        cosine = F.cosine_similarity(x, x_tilde, dim=-1)[obfuscate_BT].abs().mean()
        norm = ((x + mean).norm(dim=-1)[obfuscate_BT] - 1.0).abs().mean()
        (utility + WEIGHTS["mi"] * mi + WEIGHTS["abs_cos"] * cosine + WEIGHTS["norm"] * norm).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Arm(step, work(size))


# -- (b) this project --------------------------------------------------------------------------------------------------


def model_of(
    size: Size,
    *,
    chunk: int,
    recompute: str,
    compiled: bool,
    float8: str,
    replicas: int = 1,
    prior: str = "",
    denoiser: int = 0,
):
    """Model, loss and pair groups of a config of these shapes; random weights, sharded where there are ranks."""
    from sgt_titan.config.resolve import resolve
    from sgt_titan.config.schema import Config
    from sgt_titan.titan import cpu_support
    from sgt_titan.titan.build import meta_model, parallelize
    from sgt_titan.titan.float8 import E4M3, SCALE
    from sgt_titan.titan.initialize import initialize_estimator
    from sgt_titan.titan.pairs import make_pair_groups

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    cpu_support.install()
    world = torch.distributed.get_world_size()
    config = Config()
    config.trunk.dtype = "float32" if size.dtype == torch.float32 else "bfloat16"
    config.trunk.float8 = float8
    config.parallelism.data_parallel_replicate_degree = replicas
    config.training.seq_len, config.training.local_batch_size = size.length, size.rows
    config.training.loss_chunk_tokens = chunk
    config.estimator.layers = ESTIMATOR_LAYERS
    config.activation_checkpoint.mode, config.compile.enable = recompute, compiled
    for name, weight in WEIGHTS.items():
        getattr(config.objective, name).weight = weight
    config.denoiser.layers = denoiser
    if prior:
        config.objective.rate.weight, config.objective.rate.prior = 0.05, prior
    config = resolve(config, world_size=world)
    model, trainer, dims = meta_model(config, size.hf(), scale=0.02, world_size=world)
    parallelize(model, trainer, dims)
    model.to_empty(device=device())
    with torch.no_grad():
        model.init_states(buffer_device=device())
        for name, parameter in model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            if name.endswith(SCALE):
                local.fill_(0.02)
            elif local.dtype == E4M3:
                local.copy_(torch.randn(local.shape, device=local.device, dtype=size.dtype))
            else:
                local.normal_(std=0.02) if parameter.dim() > 1 else local.fill_(1.0)
        initialize_estimator(model.estimator, 0, torch.full((size.vocab,), -math.log(size.vocab)))
    pairs = make_pair_groups(config.objective.mi_group, size.rows, dims.get_optional_mesh("batch"))
    return model.train(), trainer.loss.build(), pairs


def ours(
    size: Size,
    *,
    chunk: int = 0,
    recompute: str = "none",
    compiled: bool = False,
    stored: int = 0,
    float8: str = "none",
    replicas: int = 1,
    prior: str = "",
    denoiser: int = 0,
) -> Arm:
    """A step of the composite model; ``stored``: with this many of the teacher's probabilities known beforehand.

    prior: with the rate under it. denoiser: with this many layers of one.
    """
    from sgt_titan.data.batch import Counts

    torch.manual_seed(0)
    model, loss_fn, pairs = model_of(
        size,
        chunk=chunk,
        recompute=recompute,
        compiled=compiled,
        float8=float8,
        replicas=replicas,
        prior=prior,
        denoiser=denoiser,
    )
    fused = torch.cuda.is_available()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=fused)
    tokens_BT, obfuscate_BT, utility_BT = batch(size)
    positions_BT = torch.arange(size.length, device=device()).expand(size.rows, -1)
    counts = Counts(int(utility_BT.sum()), int(obfuscate_BT.sum()), size.rows, size.tokens)

    def forward(keep: int = 0):
        return model(
            tokens_BT,
            positions_BT=positions_BT,
            attention_masks=None,
            obfuscate_BT=obfuscate_BT,
            utility_BT=utility_BT,
            noise_BTD=torch.randn(size.rows, size.length, size.width, device=device()),
            pairs=pairs,
            targets=targets,
            keep=keep,
        )

    targets = None
    if stored:
        with torch.no_grad():
            targets = forward(stored).targets

    def step() -> None:
        streams = forward()
        loss, _ = loss_fn(
            streams,
            None,
            step=1,
            obfuscate_BT=obfuscate_BT,
            counts=counts,
            median_norm=1.0,
            bounds=model.bounds,
            pairs=pairs,
            part=slice(0, size.length),
            tp_size=1,
        )
        del streams
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    read = 2.0 * trunk_parameters(size) * size.tokens if stored else 0.0
    added = 6.0 * (denoiser * layer_parameters(size) + size.width**2) * size.tokens if denoiser else 0.0
    return Arm(step, work(size, recompute=recompute == "full") - read + added, model)


# -- (c) torchtitan's own ----------------------------------------------------------------------------------------------


def pretraining(size: Size) -> Arm:
    """torchtitan's decoder and cross-entropy, every weight trained with AdamW.

    At 8B the weights are in bfloat16 and there is no optimizer step: its state would not fit one GPU.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.tools.utils import set_default_dtype

    from sgt_titan.titan import cpu_support
    from sgt_titan.titan.trunks import build

    cpu_support.install()
    torch.manual_seed(0)
    with torch.device(device()), set_default_dtype(size.dtype):
        model = build(size.hf(), "sdpa").build()
        if size.tied:
            model.tok_embeddings.weight = model.lm_head.weight
        with torch.no_grad():
            model.init_states(buffer_device=device())
    big = sum(p.numel() for p in model.parameters()) > 4e9
    optimizer = None if big else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=torch.cuda.is_available())
    tokens_BT, _, _ = batch(size)
    positions_BT = torch.arange(size.length, device=device()).expand(size.rows, -1)

    def step() -> None:
        logits_BTV = model(tokens_BT, positions=positions_BT)
        loss = cross_entropy_loss(logits_BTV[:, :-1], tokens_BT[:, 1:]) / size.tokens
        del logits_BTV
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return Arm(step, 6.0 * trunk_parameters(size) * size.tokens)


# -- (d) the work ------------------------------------------------------------------------------------------------------


def layer_parameters(size: Size) -> int:
    head = size.width // size.heads
    return size.width * (2 * size.width + 2 * head * size.kv_heads + 3 * size.hidden)


def trunk_parameters(size: Size) -> int:
    """Of the trunk's matrix products; attention's quadratic part is left out, as in "6N"."""
    return size.layers * layer_parameters(size) + size.vocab * size.width


def work(size: Size, *, recompute: bool = False) -> float:
    """Flops of an SGT step: 2N teacher, 2N student, 2N activation backward, 6 N of the estimator; 2N to recompute."""
    estimator = ESTIMATOR_LAYERS * layer_parameters(size) + 2 * size.width**2
    again = 2.0 * (size.layers * layer_parameters(size) + ESTIMATOR_LAYERS * layer_parameters(size)) if recompute else 0
    return (6.0 * (trunk_parameters(size) + estimator) + again) * size.tokens


@torch.no_grad()
def necessary(size: Size, *, more: bool = False, passes: bool = False) -> Arm:
    """The matrix products of an SGT step in their own shapes, and nothing else: no way to make the step is quicker.

    Products with lm_head are in our chunks of tokens. more: also attention of both streams, forward and backward of the
    student's, and a softmax of every logit, which no way can leave out either. passes: also, by torch's operators and
    each once, norms, rotations, SwiGLU and residuals of every layer, the loss's sum and difference, and AdamW.
    """
    from sgt_titan.objectives.distillation import chunk_size

    torch.manual_seed(0)
    kv, heads = size.width // size.heads * size.kv_heads, ESTIMATOR_LAYERS * [(size.width, size.width)]
    layer = [(size.width, size.width)] * 2 + [(kv, size.width)] * 2
    layer += [(size.hidden, size.width)] * 2 + [(size.width, size.hidden)]
    like = {"device": device(), "dtype": size.dtype}
    frozen = [torch.randn(shape, **like) for _ in range(size.layers) for shape in layer]
    trained = [torch.randn(shape, **like) for shape in [*layer * ESTIMATOR_LAYERS, *heads]]
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in trained], lr=1e-4)
    lm_head_VD = torch.randn(size.vocab, size.width, **like)
    rows = {width: torch.randn(size.tokens, width, **like) for width in {size.width, size.hidden, kv}}
    shape = (size.rows, size.heads, size.length, size.width // size.heads)
    q, k, v = (torch.randn(shape, **like) for _ in "qkv")
    x, residual, gate, up = (
        rows[size.width],
        torch.randn_like(rows[size.width]),
        *torch.randn(2, size.tokens, size.hidden, **like),
    )
    turned = torch.randn(*shape[:-1], shape[-1] // 2, 2, device=device())  # q; of k there are kv_heads
    angles = torch.polar(torch.ones_like(turned[0, 0, :, :, 0]), turned[0, 0, :, :, 0])
    chunk = chunk_size(size.vocab, device().type)

    def attention(*, teacher: bool) -> None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        if teacher:
            F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def activations(*given: torch.Tensor) -> list[torch.Tensor]:
        x, turned, gate, up = given
        norms = [F.rms_norm(x, x.shape[-1:]) for _ in range(2)]
        rotated = [torch.view_as_complex(part) * angles for part in (turned, turned[:, : size.kv_heads])]
        return [*norms, *rotated, F.silu(gate) * up, x + residual, x + residual]

    def layer_passes(*, teacher: bool) -> None:
        with torch.enable_grad():
            inputs = [given.detach().requires_grad_() for given in (x, turned, gate, up)]
            out = activations(*inputs)
            torch.autograd.grad(out, inputs, [given.detach() for given in out])
        if teacher:
            activations(x, turned, gate, up)

    def step() -> None:
        for weight in frozen:
            out, into = weight.shape
            F.linear(rows[into], weight), F.linear(rows[into], weight), rows[out] @ weight
        for weight in trained:
            out, into = weight.shape
            F.linear(rows[into], weight), rows[out] @ weight
            weight.grad = rows[out].T @ rows[into]
        for part in rows[size.width].split(chunk):
            logits = [F.linear(part, lm_head_VD) for _ in range(2)]
            if more or passes:
                shares = [x.softmax(-1) for x in logits]
            if passes:
                torch.linalg.vecdot(shares[0], logits[1])
                logits = [shares[1].sub_(shares[0])]
            logits[0] @ lm_head_VD
        for index in range(size.layers + ESTIMATOR_LAYERS if more or passes else 0):
            attention(teacher=index < size.layers)
            if passes:
                layer_passes(teacher=index < size.layers)
        if passes:
            optimizer.step()

    return Arm(step, work(size))


AS_STARTED = "glibc as it is started"
ARMS: dict[str, Callable[[Size], Arm]] = {
    "(a) naive: transformers twice, whole logits": naive,
    f"(a) the same, {AS_STARTED}": naive,
    "(b) one pass for both streams": lambda size: ours(size, chunk=2**30),
    "(b) + loss in chunks of tokens": ours,
    "(b) + torch.compile": lambda size: ours(size, compiled=True),
    "(b) compiled, teacher read from its cache (k 64)": lambda size: ours(size, compiled=True, stored=64),
    "(b) compiled, selective recomputation": lambda size: ours(size, compiled=True, recompute="selective"),
    "(b) compiled, full recomputation": lambda size: ours(size, compiled=True, recompute="full"),
    "(b) compiled, layers in float8": lambda size: ours(size, compiled=True, float8="weights"),
    "(b) compiled, products in float8": lambda size: ours(size, compiled=True, float8="products"),
    "(b) + rate, broad": lambda size: ours(size, prior="broad"),
    "(b) + rate, tokens": lambda size: ours(size, prior="tokens"),
    "(b) + rate, context": lambda size: ours(size, prior="context"),
    "(b) + a denoiser of 2 layers": lambda size: ours(size, denoiser=2),
    "(c) torchtitan pretraining": pretraining,
    "(d) the products of a step alone": necessary,
    "(d) and attention, and a softmax of the logits": lambda size: necessary(size, more=True),
    "(d) and every other pass once, and AdamW": lambda size: necessary(size, passes=True),
}


if __name__ == "__main__":
    sys.exit("python benchmarks/training.py")
