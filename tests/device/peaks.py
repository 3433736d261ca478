"""Peak bytes of fitting and training a layer on a device, beside eval/scaling_prune.py's formulas.

    python tests/device/pretend.py tests/device/peaks.py

prints one line of JSON: of a fit, and of a training of all experts and of half of them, the peak
above what was there before, and the formula.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
from scaling_prune import Run, distill_bytes, refit_bytes, small
from transformers import AutoModelForCausalLM

from moe_fair.engines.batch import Batch
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.oom import release
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe import repair
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.repairs import refit

torch.set_num_threads(1)
shape, config = small()
run = Run(sequences=20, length=12, kept=10, step=2, epochs=4)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to("cuda")
ids = torch.randint(1, 512, (run.sequences, run.length))
rows = [torch.arange(i, i + run.step) for i in range(0, run.sequences, run.step)]
batches = [Batch(ids[at], torch.ones_like(ids[at]), at, 0) for at in rows]
found: dict[str, int] = {}
fit, distill = repair.fit_layer, repair.distill_layer


def peak_of(name: str, work: Any, *arguments: Any, **keywords: Any) -> Any:
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    done = work(*arguments, **keywords)
    found.setdefault(name, torch.cuda.max_memory_allocated() - before)
    return done


def fitted(*arguments: Any, **keywords: Any) -> Any:
    return peak_of("refit", fit, *arguments, **keywords)


def trained(*arguments: Any, epochs: int, part: tuple[int, int]) -> Any:
    given = {"epochs": epochs, "look": False}
    peak_of("half", distill, *arguments, **given, part=(0, 2))
    return peak_of("distill", distill, *arguments, **given)


repair.fit_layer, repair.distill_layer = fitted, trained  # type: ignore[assignment]
refit.path.__kwdefaults__["direct"] = 0  # as wide experts are fitted
[name, *_] = [b.name for b in find_blocks(model)]
repair.Repairer(StreamingEngine(LoadedLayers(model)), {name: list(range(run.kept))}, "distill").run(
    batches
)
formulas = {"refit": refit_bytes(shape, run, 4), "distill": distill_bytes(shape, run, 4)}
formulas["half"] = distill_bytes(shape, run, 4, parts=2)
print(json.dumps({"found": found, "formulas": formulas}))
