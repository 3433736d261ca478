"""The oracle: the measured loss change when one unit is removed and nothing else, and how well a
score agrees with it (Molchanov et al., arXiv 1906.10771).

Shape legend: N units of a group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ORACLE_FORMAT = "moe_fair.oracle/1"


@dataclass(frozen=True)
class Oracle:
    """Loss changes per unit removed alone.

    Attributes:
        changes: group name -> [N] float64, change of the mean next-token loss in nats.
        loss: the loss with nothing removed.
        tokens: predicted tokens it was measured on.
        fingerprint: digests of the model and the text.
        metadata: whatever explains the run.
    """

    changes: Mapping[str, Tensor]
    loss: float
    tokens: int
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """One safetensors file."""
        about = {
            "loss": self.loss, "tokens": self.tokens, "fingerprint": dict(self.fingerprint),
            "facts": dict(self.metadata),
        }  # fmt: skip
        save_file(
            {k: v.contiguous() for k, v in self.changes.items()},
            path,
            {"format": ORACLE_FORMAT, "about": json.dumps(about, sort_keys=True)},
        )

    @staticmethod
    def load(path: Path) -> Oracle:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or not an oracle's.
        """
        try:
            with safe_open(path, framework="pt") as f:
                header = f.metadata() or {}
                changes = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path} cannot be read as an oracle: {e}") from e
        if header.get("format") != ORACLE_FORMAT:
            raise ValueError(f"{path} is not an oracle ({ORACLE_FORMAT})")
        about = json.loads(header["about"])
        return Oracle(changes, about["loss"], about["tokens"], about["fingerprint"], about["facts"])


@dataclass(frozen=True)
class Agreement:
    """How a score follows the oracle.

    Attributes:
        pearson, spearman: over all units of all groups.
        pearson_within, spearman_within: mean over the groups of the correlation inside each.
    """

    pearson: float
    spearman: float
    pearson_within: float
    spearman_within: float


def agreement(scores: Mapping[str, Tensor], oracle: Oracle) -> Agreement:
    """Correlations of scores (group name -> [N], high = important) with the measured changes.

    Raises:
        ValueError: the two cover different groups or numbers of units.
    """
    if {k: v.shape for k, v in scores.items()} != {k: v.shape for k, v in oracle.changes.items()}:
        raise ValueError("the oracle and the scores are of different models")
    pairs = [(scores[n].double(), oracle.changes[n].double()) for n in oracle.changes]
    s, o = (torch.cat(t) for t in zip(*pairs, strict=True))
    within = [(pearson(a, b), pearson(ranks(a), ranks(b))) for a, b in pairs]
    return Agreement(
        pearson(s, o),
        pearson(ranks(s), ranks(o)),
        sum(p for p, _ in within) / len(within),
        sum(r for _, r in within) / len(within),
    )


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two samples [N]; 0 where one of them is constant."""
    x, y = a - a.mean(), b - b.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else 0.0


def ranks(a: Tensor) -> Tensor:
    """[N] ranks from 0, ties sharing their mean."""
    _, place, count = a.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[place]
