"""Agreement with the oracle against scipy; the file it is kept in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

from moe_fair.core.oracle import Oracle, agreement, ranks


def test_correlations_are_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    changes = {n: torch.randn(20, generator=g, dtype=torch.float64) for n in "ab"}
    scores = {n: (c + torch.randn(20, generator=g)).round(decimals=0) for n, c in changes.items()}
    found = agreement(scores, Oracle(changes, 1.0, 10))
    s, o = (torch.cat([d["a"], d["b"]]).numpy() for d in (scores, changes))
    assert found.pearson == pytest.approx(stats.pearsonr(s, o).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(s, o).statistic, abs=1e-12)
    for kind, of in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        inside = sum(of(scores[n].numpy(), changes[n].numpy()).statistic for n in "ab") / 2
        assert getattr(found, kind + "_within") == pytest.approx(inside, abs=1e-12)


def test_a_constant_score_agrees_with_nothing() -> None:
    oracle = Oracle({"a": torch.arange(4.0)}, 1.0, 10)
    assert agreement({"a": torch.ones(4)}, oracle).pearson == 0
    with pytest.raises(ValueError, match="different models"):
        agreement({"a": torch.ones(5)}, oracle)


def test_ranks_begin_at_0_and_ties_share_their_mean() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 1.0, 7.0])).tolist() == [2, 0.5, 0.5, 3]


def test_it_is_kept_whole(tmp_path: Path) -> None:
    oracle = Oracle({"a": torch.randn(4).double()}, 2.5, 77, {"model": "m"}, {"seed": 3})
    oracle.save(tmp_path / "o.safetensors")
    again = Oracle.load(tmp_path / "o.safetensors")
    assert torch.equal(again.changes["a"], oracle.changes["a"])
    assert (again.loss, again.tokens, again.fingerprint, again.metadata) == (
        2.5, 77, {"model": "m"}, {"seed": 3},
    )  # fmt: skip
    (tmp_path / "o.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as an oracle"):
        Oracle.load(tmp_path / "o.safetensors")
