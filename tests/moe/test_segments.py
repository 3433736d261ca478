"""Sums over experts' rows: what devices run, on a CPU, against a naive loop."""

from __future__ import annotations

import pytest
import torch

from moe_fair.moe import segments


@pytest.mark.parametrize("padded", [False, True])
def test_every_way_equals_a_loop(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "CELLS", 1500)  # several pieces
    monkeypatch.setattr(segments, "ROWS", 32)  # the last of them not full
    g = torch.Generator().manual_seed(0)
    tokens, k, size, width = 50, 3, 7, 24
    ids = torch.stack([torch.randperm(size - 1, generator=g)[:k] for _ in range(tokens)])
    values = torch.randn(5, tokens * k, generator=g, dtype=torch.float64)
    f = torch.randn(tokens * k, width, generator=g)
    counted = (torch.rand(tokens * k, generator=g) > 0.3).double() if padded else None
    flat = ids.flatten()
    want, want_vectors = torch.zeros(5, size).double(), torch.zeros(2, size, width).double()
    for s, e in enumerate(flat.tolist()):
        want[:, e] += values[:, s]
        row = f[s].double() * (1 if counted is None else counted[s])
        want_vectors[0, e] += row
        want_vectors[1, e] += row * row

    for way in (segments.sums, segments.dense_sums):
        torch.testing.assert_close(way(values, ids, size), want)
    length = 10
    each = torch.zeros(tokens // length, size).double()
    for s, e in enumerate(flat.tolist()):
        each[s // k // length, e] += values[0, s]
    for whole in (segments.sequence_sums, segments.dense_sequence_sums):
        torch.testing.assert_close(whole(values[0], ids, size, length), each)
    for got in (
        segments.vector_sums(f, flat, size, counted),
        segments.dense_vector_sums(f, flat, size, counted),
    ):
        torch.testing.assert_close(got, want_vectors, rtol=1e-6, atol=1e-6)
        assert not got[:, -1].any()  # the last expert has no row


def test_weights_of_float64_stay_as_they_are() -> None:
    w = torch.randn(3, 4, 5, dtype=torch.float64)
    before = w.clone()
    got = segments.weight_sums(w)
    torch.testing.assert_close(got[0], before.abs().sum((1, 2)))
    torch.testing.assert_close(got[1], before.square().sum((1, 2)))
    assert torch.equal(w, before)
    torch.testing.assert_close(segments.dense_weight_sums(w), got)
    rounded = segments.dense_weight_sums(w.float())
    torch.testing.assert_close(rounded, got, rtol=1e-6, atol=0)
