"""A rotation as a substitution cipher: the same token is the same vector, whatever the basis and whatever the weights.

So neither weights nor table are needed. Equal vectors are one symbol; symbols are read as the emissions of a hidden
Markov model over the words of public text, by expectation maximisation (decipherment: Ravi and Knight, ACL 2011),
started from how often each occurs. The more of a client's traffic is seen, the better.

Legend: N hidden tokens flat, B runs of them, T longest run, S symbols, W words of the model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.attacks.rotation_procrustes import orthogonal
from sgt_titan.evaluation.world.threat import UNKNOWN, Corpus, Cost, Guess, Observation, Size, Table

GUESSES = 10
SAME = 1e-3  # of a vector's length: rounding of the wire


def substitution(observation: Observation, corpus: Corpus, *, words: int = 800, rounds: int = 30) -> Guess:
    """Each symbol's most probable words; a note says how many symbols were seen."""
    read = decipher(observation, corpus, words, rounds)
    top_NK = torch.full((len(read.symbol_N), GUESSES), UNKNOWN)
    likely_NK = read.share_NW.topk(min(GUESSES, len(read.word_W))).indices
    top_NK[:, : likely_NK.shape[1]] = read.word_W[likely_NK]
    return Guess(top_NK, flops=read.flops, notes=(read.note,))


def substitution_table(
    observation: Observation, corpus: Corpus, table: Table, *, words: int = 800, rounds: int = 30, turns: int = 20
) -> Guess:
    """What the cipher gave away is known plaintext: the rotation that fits it and the table best, nearest rows, the
    rotation that fits these, and so on until they stay. Needs neither weights nor pairs.

    turns: of fitting and looking up, at most.
    """
    read = decipher(observation, corpus, words, rounds)
    rows_VD, x_ND = table.rows_VD.double().cpu(), observation.x_tilde_ND.double().cpu()
    # At first a vector weighs as often as it was seen: of those seen often more is known, and where the posterior is
    # flat the expected row is short. Then each once, since rare ones bring what directions are missing.
    U_DD = orthogonal(x_ND.T @ (read.share_NW.double() @ rows_VD[read.word_W]))
    x_SD, before_S = mean_by(x_ND, read.symbol_N), None
    for _ in range(turns):
        top_SK = top_rows(x_SD @ U_DD, rows_VD, GUESSES)
        if before_S is not None and torch.equal(top_SK[:, 0], before_S):
            break
        before_S = top_SK[:, 0]
        U_DD = orthogonal(x_SD.T @ rows_VD[before_S])
    fit = torch.nn.functional.cosine_similarity(x_SD @ U_DD, rows_VD[before_S], dim=-1).mean()
    note = f"turned, the vectors agree with the rows of the table to a cosine of {fit:.3f}"
    return Guess(top_SK[read.symbol_N], flops=read.flops, notes=(read.note, note))


def mean_by(x_ND: torch.Tensor, symbol_N: torch.Tensor) -> torch.Tensor:
    """(S, D): the mean over each symbol's places."""
    count_S = symbol_N.bincount()
    return x_ND.new_zeros(len(count_S), x_ND.shape[1]).index_add_(0, symbol_N, x_ND) / count_S[:, None]


class Deciphered(NamedTuple):
    """symbol_N; word_W: tokens of the model's words; share_NW: the posterior of each place."""

    symbol_N: torch.Tensor
    word_W: torch.Tensor
    share_NW: torch.Tensor
    note: str
    flops: float


def decipher(observation: Observation, corpus: Corpus, words: int, rounds: int) -> Deciphered:
    """Expectation maximisation over what was sent."""
    symbol_N = symbols(observation.x_tilde_ND)
    runs = [symbol_N[observation.row_N.to(symbol_N.device) == b] for b in range(len(observation.hidden))]
    texts = [torch.as_tensor(row.ids, dtype=torch.int64) for row in corpus.rows]
    word_W = torch.cat(texts).bincount().argsort(descending=True, stable=True)[:words]
    first_W, next_WW = bigrams(texts, word_W)
    counts_S = symbol_N.bincount().double()
    emit_WS = by_frequency(first_W, counts_S)
    batch_BT, valid_BT = _padded(runs)
    for turn in range(rounds + 1):
        share_BTW, emitted_WS = expectation(batch_BT, valid_BT, emit_WS, next_WW, first_W)
        if turn == rounds:
            break
        emit_WS = emitted_WS + SMOOTHING * by_frequency(first_W, counts_S)
        emit_WS = emit_WS / emit_WS.sum(-1, keepdim=True)
    note = f"{len(counts_S)} different vectors among {len(symbol_N)}"
    flops = 4.0 * rounds * batch_BT.numel() * len(word_W) ** 2
    return Deciphered(symbol_N, word_W, share_BTW[valid_BT], note, flops)


SMOOTHING = 1e-3


def symbols(x_ND: torch.Tensor) -> torch.Tensor:
    """(N,) int64: equal for vectors that differ by rounding."""
    x_ND = x_ND.double().cpu()
    norm_N = x_ND.norm(dim=-1)
    symbol_N = torch.full((len(x_ND),), -1)
    order_N, count = norm_N.argsort(), 0
    for place, index in enumerate(order_N.tolist()):
        if symbol_N[index] >= 0:
            continue
        # Of nearly the same norm, and so few.
        stop = int(torch.searchsorted(norm_N[order_N], norm_N[index] * (1 + SAME), right=True))
        near_M = order_N[place:stop]
        near_M = near_M[(symbol_N[near_M] < 0) & ((x_ND[near_M] - x_ND[index]).norm(dim=-1) <= SAME * norm_N[index])]
        symbol_N[near_M] = count
        count += 1
    return symbol_N


def bigrams(texts: list[torch.Tensor], word_W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies of the words (W,) and of what follows each (W, W), Witten-Bell smoothed; all rows sum to 1."""
    W = len(word_W)
    place_V = torch.full((int(max(t.max() for t in texts)) + 1,), -1)
    place_V[word_W] = torch.arange(W)
    count_WW, count_W = torch.zeros(W * W, dtype=torch.float64), torch.zeros(W, dtype=torch.float64)
    for text_T in texts:
        at_T = place_V[text_T]
        count_W += at_T[at_T >= 0].bincount(minlength=W)
        both = (at_T[:-1] >= 0) & (at_T[1:] >= 0)
        count_WW += (at_T[:-1] * W + at_T[1:])[both].bincount(minlength=W * W)
    count_WW = count_WW.reshape(W, W)
    first_W = count_W / count_W.sum()
    kinds_W1 = (count_WW > 0).sum(-1, keepdim=True).clamp_min(1)
    return first_W, (count_WW + kinds_W1 * first_W) / (count_WW.sum(-1, keepdim=True) + kinds_W1)


def by_frequency(first_W: torch.Tensor, counts_S: torch.Tensor) -> torch.Tensor:
    """p(symbol | word) (W, S): symbols seen about as often as the word should be."""
    expected_W = (first_W * counts_S.sum()).clamp_min(0.5).log()
    near_WS = torch.exp(-2 * (expected_W[:, None] - counts_S.log()).square()) * counts_S + 1e-6 * counts_S
    return near_WS / near_WS.sum(-1, keepdim=True)


def expectation(
    symbol_BT: torch.Tensor, valid_BT: torch.Tensor, emit_WS: torch.Tensor, next_WW: torch.Tensor, first_W: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior of the word at every place (B, T, W), and expected emissions (W, S): forward and backward passes."""
    B, T = symbol_BT.shape
    seen_TBW = emit_WS.T.float()[symbol_BT.T].clamp_min(1e-12)
    seen_TBW[~valid_BT.T] = 1.0  # behind a run's end
    step_WW = next_WW.float()
    forward_TBW, backward_TBW = torch.empty_like(seen_TBW), torch.ones_like(seen_TBW)
    state_BW = first_W.float().expand(B, -1)
    for t in range(T):
        state_BW = (state_BW if t == 0 else state_BW @ step_WW) * seen_TBW[t]
        state_BW = state_BW / state_BW.sum(-1, keepdim=True).clamp_min(1e-30)
        forward_TBW[t] = state_BW
    for t in range(T - 2, -1, -1):
        state_BW = (backward_TBW[t + 1] * seen_TBW[t + 1]) @ step_WW.T
        backward_TBW[t] = state_BW / state_BW.sum(-1, keepdim=True).clamp_min(1e-30)
    share_TBW = forward_TBW * backward_TBW
    share_BTW = (share_TBW / share_TBW.sum(-1, keepdim=True).clamp_min(1e-30)).transpose(0, 1)
    emitted_SW = torch.zeros(emit_WS.shape[1], emit_WS.shape[0])
    emitted_SW.index_add_(0, symbol_BT[valid_BT], share_BTW[valid_BT])
    emitted_WS = emitted_SW.T.double()
    return share_BTW, emitted_WS / emitted_WS.sum(-1, keepdim=True).clamp_min(1e-30)


def _padded(runs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    batch_BT = torch.nn.utils.rnn.pad_sequence([r.cpu() for r in runs], batch_first=True)
    length_B1 = torch.tensor([len(r) for r in runs])[:, None]
    return batch_BT, torch.arange(batch_BT.shape[1]) < length_B1


def cost(size: Size, *, words: int = 800, rounds: int = 30, turns: int = 0) -> Cost:
    W = min(words, size.vocab)
    look_up = 2.0 * turns * size.tokens * size.vocab * size.width
    return Cost(
        look_up + 4.0 * rounds * size.rows * size.longest * W**2, 16.0 * size.rows * size.longest * W + 16.0 * W**2
    )
