"""A model's next-token predictions as its most probable tokens and the rest, and KL from them.

With p the original's distribution, q the pruned model's, S the K most probable tokens of p, and
all others together one outcome more:

    KL = Σ_{v ∈ S} p(v) log(p(v) / q(v)) + p(∉S) log(p(∉S) / q(∉S))

which is never above KL(p ‖ q), and equal to it where S is the whole vocabulary. Renormalised to S
instead, q would be drawn to give no other token any probability: the bias of plain top-k, and the
rest as one outcome against it, are those of arXiv 2503.16870, section 3 (its "ghost token").

Shape legend: B sequences, L tokens, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOP = 64  # tokens kept of each prediction


@dataclass(frozen=True)
class Predictions:
    """Of every position.

    Attributes:
        ids: [B, L, K] int32 tokens, the most probable first.
        log_p: [B, L, K] float32 their log-probabilities.
        rest: [B, L] float32 log-probability of all others together; -inf where there are none.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> Predictions:
        """The same on another device."""
        return Predictions(*(t.to(device) for t in (self.ids, self.log_p, self.rest)))


def stacked(rows: Sequence[Predictions]) -> Predictions:
    """Of sequences of [L, K] each, padded on the right to the longest."""
    columns = zip(*((r.ids, r.log_p, r.rest) for r in rows), strict=True)
    return Predictions(*(pad_sequence(list(c), batch_first=True) for c in columns))


def top_predictions(logits: Tensor, top: int = TOP) -> Predictions:
    """What [B, L, V] logits predict."""
    log_q = logits.float().log_softmax(-1)
    log_p, ids = log_q.topk(min(top, log_q.shape[-1]), dim=-1)
    return Predictions(ids.int(), log_p, _others(log_q, ids))


def divergence(logits: Tensor, wanted: Predictions) -> Tensor:
    """[B, L] KL of what [B, L, V] logits predict from what is wanted, in nats."""
    log_q = logits.float().log_softmax(-1)
    ids = wanted.ids.long()
    kl = _terms(wanted.log_p, log_q.gather(-1, ids)).sum(-1)
    if ids.shape[-1] == log_q.shape[-1]:
        return kl
    return kl + _terms(wanted.rest, _others(log_q, ids))


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q); nothing of outcomes that p rules out."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)


def _others(log_q: Tensor, ids: Tensor) -> Tensor:
    """[B, L] log-probability of all tokens but these: of what is small no difference from one."""
    return log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
