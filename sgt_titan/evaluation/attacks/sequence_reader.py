"""The networks of the sequence attacker: softmax over the vocabulary, from the whole context.

An *encoder* looks both ways over what was sent and gives each position's marginal posterior. A *decoder* goes from left
to right over the encoder's view and the tokens before, and so gives the posterior of the sequence. Both are bodies of
transformers' decoder-only models, new ones or the trunk's own (the best public prior of the language there is).

Both add a correction to the linear start, with which they begin: the best that can be read from one token alone.
An encoder may *point*: give a share of its probability to the clean tokens around, where it looks for them (a
pointer-generator, arXiv 1704.04368). What an answer repeats of its prompt is copied that way, not learnt by heart.

While a reader trains, the products of its linear layers are in bfloat16 where the machine is quicker at that; logits,
whose small differences count beside their size, and all that is read are in float32.

Legend: B rows, T positions, N hidden tokens flat, V vocabulary, D width of the table, H width of a body, C beams.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from sgt_titan.evaluation.attacks.linear_start import Start, scaled

HEAD = 64  # of attention; smaller bodies have heads of half their width
LEAST = 1e-20  # probability of a token that nobody points to


class Rounded(nn.Linear):
    """A product in bfloat16 while it trains, between float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, rounds=self.training)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rounds: bool) -> torch.Tensor:
    """torch's, in bfloat16 between float32 where it ``rounds`` and that is quicker."""
    if not (rounds and quick_in_bfloat16(x.device.type)):
        return nn.functional.linear(x, weight, bias)
    bias = None if bias is None else bias.bfloat16()
    return nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias).float()


@cache
def quick_in_bfloat16(device: str) -> bool:
    """Whether its products in bfloat16 are quicker than in float32, by what the processor says that it has."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    has = torch.cpu.get_capabilities()
    return device == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def round_products(reader: nn.Module) -> None:
    """Give every linear layer of it such products."""
    for module in reader.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounded


def new_body(width: int, layers: int) -> PreTrainedModel:
    """A small Llama without a table of its own."""
    heads = max(2, width // HEAD)
    config = LlamaConfig(
        vocab_size=2, hidden_size=width, intermediate_size=(8 * width // 3 + 31) // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=1 << 16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaModel(config)


def trunk_body(trunk: PreTrainedModel) -> PreTrainedModel:
    """A copy of the trunk's layers, in float32 and trainable, without its table."""
    base = cast(PreTrainedModel, trunk.base_model)
    skipped: dict[int, Any] = {id(base.get_input_embeddings()): None}  # a copy of a large table would be thrown away
    body = copy.deepcopy(base, skipped).float()
    return body.requires_grad_(True)


class Reader(nn.Module):
    """``encoder`` and, where tokens are read one after another, ``decoder``: bodies. start None: nothing of what was
    sent is seen. head: the trunk's (V, H), where the decoder is the trunk's body: it starts as that language model."""

    rows_VD: torch.Tensor
    scale_D: torch.Tensor
    log_frequency_V: torch.Tensor
    start_DD: torch.Tensor
    from_D: torch.Tensor
    start_V: torch.Tensor
    std_D: torch.Tensor

    def __init__(
        self,
        table_VD: torch.Tensor,
        log_frequency_V: torch.Tensor,
        start: Start | None,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel | None = None,
        *,
        longest: int,
        head: nn.Module | None = None,
        from_trunk: bool = False,
        points: bool = False,
    ):
        super().__init__()
        rows_VD, scale_D = scaled(table_VD)
        V, D = table_VD.shape
        H = encoder.config.hidden_size
        self.register_buffer("rows_VD", rows_VD, persistent=False)
        self.register_buffer("scale_D", scale_D, persistent=False)
        self.register_buffer("log_frequency_V", log_frequency_V.float(), persistent=False)
        self.sees, self.from_trunk = start is not None, from_trunk
        if start is not None:
            self.register_buffer("start_DD", start.weight_DD.float(), persistent=False)
            self.register_buffer("from_D", start.from_D.float(), persistent=False)
            self.register_buffer("start_V", start.bias_V.float(), persistent=False)
            self.register_buffer("std_D", torch.ones(D), persistent=False)
            self.log_tau = nn.Parameter(torch.tensor(float(start.log_tau)))
            self.enter = nn.Linear(D, H)
        self.text = nn.Linear(3 * D, H)
        self.unseen = nn.Parameter(torch.zeros(H))
        self.place = nn.Embedding(longest, H)
        nn.init.normal_(self.place.weight, std=0.02)
        self.encoder = encoder
        self.leave = nn.Linear(H, D)
        self.bias_V = nn.Parameter(torch.zeros(V))
        zeros: list[nn.Linear | nn.Embedding] = [self.leave]
        self.points = points
        if points:
            self.ask, self.key, self.share = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, 1)
            zeros.append(self.share)
        if from_trunk:  # the trunk reads the estimated text, and what is added begins at nothing
            zeros += [self.place, self.text, *([self.enter] if self.sees else [])]
        self.decoder, self.head = decoder, head
        if decoder is not None:
            G = decoder.config.hidden_size
            self.bridge, self.previous = nn.Linear(H, G), nn.Linear(D, G)
            self.leave_decoder = nn.Linear(G, D)
            zeros += [self.leave_decoder, *([self.bridge, self.previous] if head is not None else [])]
        for module in zeros:
            nn.init.zeros_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if points:
            nn.init.constant_(self.share.bias, -2.0)  # an eighth at first
        round_products(self)

    # -- what one token says alone --

    def alone(self, x_ND: torch.Tensor) -> torch.Tensor | None:
        """tau W (x~ - from), (N, D): its product with the scaled rows is the linear start."""
        return self.log_tau.exp() * ((x_ND - self.from_D) @ self.start_DD.T) if self.sees else None

    def logits(self, correction_ND: torch.Tensor, alone_ND: torch.Tensor | None) -> torch.Tensor:
        """(N, V), float32."""
        if alone_ND is None:
            return correction_ND @ self.rows_VD.T + (self.bias_V + self.log_frequency_V)
        bias_V = self.log_tau.exp() * self.start_V + self.bias_V + self.log_frequency_V
        return (correction_ND + alone_ND) @ self.rows_VD.T + bias_V

    @torch.no_grad()
    def expected(self, x_ND: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
        """The mean of the scaled table's rows under the linear start, (N, D): the best estimate of a token alone."""
        nothing = torch.zeros((), device=x_ND.device)
        p_NV = (torch.softmax(self.logits(nothing, self.alone(x_CD)), -1) for x_CD in x_ND.split(chunk))
        return torch.cat([linear(p_CV, self.rows_VD.T, rounds=self.training) for p_CV in p_NV])

    # -- both ways --

    def encode(
        self, x_BTD: torch.Tensor | None, tokens_BT: torch.Tensor, hidden_BT: torch.Tensor, valid_BT: torch.Tensor
    ) -> torch.Tensor:
        """(B, T, H). ``tokens_BT`` counts at clean positions alone. ``x_BTD`` None: nothing is seen."""
        T = tokens_BT.shape[1]
        # The text as the linear start estimates it, zero where nothing is seen: its neighbours enter with each token,
        # so that short phrases need not be found by attention.
        text_BTD = self.rows_VD[tokens_BT.masked_fill(hidden_BT, 0)].masked_fill(hidden_BT[..., None], 0.0)
        h_BTH = self.place(torch.arange(T, device=tokens_BT.device).clamp_max(self.place.num_embeddings - 1))
        h_BTH = h_BTH + self.unseen * hidden_BT[..., None]
        if self.sees:
            assert x_BTD is not None, "this reader was trained to see what was sent"
            x_ND = x_BTD[hidden_BT]
            text_BTD[hidden_BT] = self.expected(x_ND)
            # A far tail of the input must not saturate the first layer; the linear start sees it unclipped.
            h_BTH[hidden_BT] = h_BTH[hidden_BT] + self.enter(((x_ND - self.from_D) / self.std_D).clamp(-20, 20))
        text_BTD = text_BTD * valid_BT[..., None]
        around = [text_BTD, nn.functional.pad(text_BTD, (0, 0, 1, -1)), nn.functional.pad(text_BTD, (0, 0, -1, 1))]
        h_BTH = h_BTH + self.text(torch.cat(around, -1))
        if self.from_trunk:
            h_BTH = h_BTH + text_BTD * self.scale_D
        mask_B1TT = valid_BT[:, None, None, :].expand(-1, 1, T, -1)
        return self.encoder(inputs_embeds=h_BTH, attention_mask=mask_B1TT, use_cache=False).last_hidden_state

    def marginal(self, h_NH: torch.Tensor, x_ND: torch.Tensor | None) -> torch.Tensor:
        """Logits (N, V) of each hidden token, given all that was sent."""
        return self.logits(self.leave(h_NH), None if x_ND is None else self.alone(x_ND))

    def posterior(
        self,
        h_BTH: torch.Tensor,
        x_ND: torch.Tensor | None,
        tokens_BT: torch.Tensor,
        hidden_BT: torch.Tensor,
        valid_BT: torch.Tensor,
        asked_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (N, V) of the hidden tokens, or of those ``asked`` for: ``marginal``, mixed with the clean tokens of
        the row that each looks at where the reader points. ``x_ND``: what was sent for these tokens."""
        asked_BT = hidden_BT if asked_BT is None else asked_BT
        logits_NV = self.marginal(h_BTH[asked_BT], x_ND)
        if not self.points:
            return logits_NV
        look_NT, share_N = self._pointed(h_BTH, hidden_BT, valid_BT, asked_BT)
        row_NT = tokens_BT.clamp_min(0)[asked_BT.nonzero()[:, 0]]
        copied_NV = torch.zeros_like(logits_NV).scatter_add_(1, row_NT, look_NT)
        mixed_NV = (1 - share_N[:, None]) * torch.softmax(logits_NV, -1) + share_N[:, None] * copied_NV
        return mixed_NV.clamp_min(LEAST).log()

    def nats(
        self,
        h_BTH: torch.Tensor,
        x_ND: torch.Tensor | None,
        tokens_BT: torch.Tensor,
        hidden_BT: torch.Tensor,
        valid_BT: torch.Tensor,
    ) -> torch.Tensor:
        """-log p (N,) of the hidden tokens, which are ``tokens_BT`` there: cross-entropy by ``posterior``, without the
        probabilities of the others."""
        target_N = tokens_BT[hidden_BT]
        nats_N = nn.functional.cross_entropy(self.marginal(h_BTH[hidden_BT], x_ND), target_N, reduction="none")
        if not self.points:
            return nats_N
        look_NT, share_N = self._pointed(h_BTH, hidden_BT, valid_BT, hidden_BT)
        copied_N = (look_NT * (tokens_BT[hidden_BT.nonzero()[:, 0]] == target_N[:, None])).sum(-1)
        return -((1 - share_N) * (-nats_N).exp() + share_N * copied_N).clamp_min(LEAST).log()

    def _pointed(
        self, h_BTH: torch.Tensor, hidden_BT: torch.Tensor, valid_BT: torch.Tensor, asked_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of those asked for: how they look at the clean positions of their row (N, T), and the share that has (N,)."""
        clean_NT = (valid_BT & ~hidden_BT)[asked_BT.nonzero()[:, 0]]
        score_BTT = self.ask(h_BTH) @ self.key(h_BTH).mT / h_BTH.shape[-1] ** 0.5
        look_NT = torch.softmax(score_BTT[asked_BT].masked_fill(~clean_NT, -1e9), -1) * clean_NT
        share_N = torch.sigmoid(self.share(h_BTH[asked_BT]))[:, 0] * clean_NT.any(1)
        return look_NT, share_N

    # -- from left to right --

    def decode(
        self,
        h_BTH: torch.Tensor,
        previous_BT: torch.Tensor,
        *,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """The decoder's states (B, T, G), given the token before each position (-1: none). Padding is on the right."""
        assert self.decoder is not None, "this reader goes both ways alone"
        rows_BTD = self.rows_VD[previous_BT.clamp_min(0)] * (previous_BT >= 0)[..., None]
        in_BTG = self.bridge(h_BTH) + self.previous(rows_BTD)
        if self.head is not None:
            in_BTG = in_BTG + rows_BTD * self.scale_D
        more: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        length = in_BTG.shape[1] + (0 if cache is None else cache.get_seq_length())
        if self.head is not None and length > 1:  # a language model never saw the place before the first token
            seen_BT = torch.ones(in_BTG.shape[0], length, dtype=torch.bool, device=in_BTG.device)
            seen_BT[:, 0] = False
            more["attention_mask"] = seen_BT
        return self.decoder(inputs_embeds=in_BTG, **more).last_hidden_state

    def following(self, g_NG: torch.Tensor, x_ND: torch.Tensor | None) -> torch.Tensor:
        """Logits (N, V) of each hidden token, given all that was sent and the tokens before it."""
        logits_NV = self.logits(self.leave_decoder(g_NG), None if x_ND is None else self.alone(x_ND))
        if self.head is None:
            return logits_NV
        # The language model's own probabilities take the place of the frequencies.
        return logits_NV + self.head(g_NG)[:, : logits_NV.shape[1]] - self.log_frequency_V
