"""The cost model of eval/SCALING.md holds at a size that fits here, term by term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from places import ROOT
from processes import python
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TERMS = {
    "parameters", "bytes of one layer, float32", "bytes read", "FLOPs", "boundary activations",
    "statistics",
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.slow
def test_every_term_is_what_is_measured() -> None:
    done = python(ROOT / "eval" / "scaling.py", "--check")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    found = {(model, term): float(ratio) for model, term, _, _, ratio in rows}
    for kind in ("small qwen3_moe", "small deepseek_v3"):
        assert {term for model, term in found if model == kind} == TERMS
    assert len(found) == 3 + 2 * len(TERMS)
    assert all(abs(ratio - 1) < 1e-3 for ratio in found.values()), found


@pytest.mark.slow
def test_the_tables_are_those_of_the_script() -> None:
    done = python(ROOT / "eval" / "scaling.py")
    assert done.stdout.strip() in (ROOT / "eval" / "SCALING.md").read_text()


@pytest.mark.slow
@pytest.mark.nightly
def test_what_a_default_prune_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of every stage are those that torch counts, the optimizer's bytes those it touches;
    and at the full shape they are within what was aimed at."""
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    import scaling_prune

    told = (ROOT / "eval" / "SCALING.md").read_text()
    lines = list(scaling_prune.check())
    assert "\n".join(lines) in told
    rows = "\n".join(lines).splitlines()[2:]
    assert len(rows) == 5
    assert all(row.endswith("| 1.0000 |") for row in rows)
    assert "\n".join(scaling_prune.table()) in told
    full, run = scaling_prune.QWEN, scaling_prune.Run()
    costs = {name: term(full, run) for name, term in scaling_prune.STAGES.items()}
    assert costs["repair: refit"] < 3e15
    assert costs["repair: distill"] < 12e15
    assert sum(costs.values()) < 22e15
    assert scaling_prune.optimizer_bytes(full, run) < 37e9 / 2


class _Touched(TorchDispatchMode):
    """Bytes that operations read and write; of foreach and fused ones that of their lists."""

    views = ("view", "detach", "alias", "t", "unsqueeze", "squeeze")
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in self.views:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {t.data_ptr() for t in given}
        self.total += sum(t.nbytes for t in made if t.data_ptr() not in known)
        if name == "_fused_adamw_":  # four lists read, all but the gradients written
            lists = args[:4]
            self.total += sum(t.nbytes for x in lists for t in x)
            self.total += sum(t.nbytes for i in (0, 2, 3) for t in lists[i])
        else:  # of a copy in place one is written, not read: as many bytes
            self.total += sum(t.nbytes for t in given)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_that_a_step_of_the_optimizer_moves(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    import scaling_prune

    from moe_fair.moe.layer_distillation import _step

    shape, _ = scaling_prune.small()
    run = scaling_prune.Run(kept=8)
    count = scaling_prune.block_weights(shape, run.kept)
    masters = {n: torch.randn(count // 2 + n * (count % 2)) for n in (0, 1)}
    cast = {n: m.to(dtype).clone().requires_grad_(True) for n, m in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), fused=True)
    for _ in range(2):  # the first one also makes the moments
        for p in cast.values():
            p.grad = torch.randn_like(p)
        with torch.no_grad(), _Touched() as touched:
            _step(optimizer, masters, cast)
    written = count * dtype.itemsize  # the gradients, by the backward
    expected = scaling_prune.optimizer_bytes(shape, run, dtype.itemsize)
    assert touched.total + written == pytest.approx(expected, rel=0.01)
