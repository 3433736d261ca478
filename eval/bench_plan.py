"""How long re-planning takes: scores in, plan out.

    python eval/bench_plan.py

Median of 5 after a warm-up, for the size of Qwen1.5-MoE (24 layers of 60 experts) and of Kimi-K2
(61 of 384), with independent rankings and with ones that agree, at half of the experts removed.
Targets: 50 ms and 1 s.
"""

from __future__ import annotations

import statistics
import time

import torch

from moe_fair.core.plan import ModelSize, Target, make_plan
from moe_fair.core.units import Scores, UnitGroup

REPEATS = 5
CASES = [(24, 60, 0.05), (61, 384, 1.0)]  # layers, experts, target in seconds


def seconds(layers: int, experts: int, agree: float, allocator: str) -> float:
    """Median wall time of one plan."""
    groups = tuple(UnitGroup(f"l{i}", i, experts, 4, 10, 20) for i in range(layers))
    generator = torch.Generator().manual_seed(0)
    new = lambda: torch.rand(experts, generator=generator, dtype=torch.float64)  # noqa: E731
    u = {g.name: new() for g in groups}
    r = {name: agree * x + (1 - agree) * new() for name, x in u.items()}
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        make_plan(
            groups,
            Scores("u", u),
            Scores("r", r),
            target=Target(mean_kept=experts // 2),
            allocator=allocator,
            before=ModelSize(10**9, 2 * 10**9),
        )
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Print a row per case."""
    print("| layers × experts | rankings | allocator | median | target |\n|---|---|---|---|---|")
    for layers, experts, target in CASES:
        for agree in (0.0, 0.9):
            for allocator in ("tod", "uniform", "global"):
                took = seconds(layers, experts, agree, allocator)
                kind = "agree" if agree else "independent"
                print(
                    f"| {layers} × {experts} | {kind} | {allocator} | {took * 1e3:.1f} ms "
                    f"| {target * 1e3:.0f} ms |"
                )


if __name__ == "__main__":
    main()
