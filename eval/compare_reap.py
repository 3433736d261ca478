"""Compare our REAP scores with those of llm-compressor, computed by its own code.

    python -m venv llmcompressor-env
    llmcompressor-env/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    llmcompressor-env/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python eval/compare_reap.py --peer-python llmcompressor-env/bin/python

The peer needs an environment of its own: 0.14.0.1 wants transformers 5.15 to 5.17. Any torch from
2.10 to 2.14 does; naming the version again keeps pip from replacing the CPU build by a CUDA one.

The same sequences go through both, one by one, in float32 on the CPU, through the uncut model. The
largest relative difference over the experts of each layer is printed; the exit code is 1 where one
is above 1e-5.

The two sides compute an expert with different kernels, so hidden states differ in their last bits.
Where the last chosen and the first unchosen expert of a token are that close, the token goes to
another expert on one side, and what follows in that sequence changes. Sequences in which an expert
of any layer saw another number of tokens are counted, printed, and left out of a second run of both
sides, which is the one that is judged. If they are more than a tenth of all, that is a failure too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_fair.core.recipe import Recipe
from moe_fair.engines.batch import Batch
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.criteria import criterion
from moe_fair.moe.statistics import collecting, unasked
from moe_fair.pipelines import moe as pipeline

WORKER = Path(__file__).parent / "peers" / "llmcompressor_reap.py"
BOUND = 1e-5
MOST_LEFT_OUT = 0.1


@dataclass(frozen=True)
class Measured:
    """What one side found, by decoder layer.

    Attributes:
        scores: [E] float64.
        tokens: [S, E] float64, routed tokens of each expert in each sequence.
    """

    scores: dict[int, torch.Tensor]
    tokens: dict[int, torch.Tensor]


def main() -> int:
    """Measure on both sides, print a line per layer; the exit code."""
    args = _arguments()
    recipe = Recipe(
        model=args.model,
        calibration=(args.text,),
        samples=args.samples,
        length=args.length,
        seed=args.seed,
    )
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, _say)
    batches = text.batches(1)

    def both(chosen: list[Batch]) -> tuple[Measured, Measured]:
        ours = our_scores(source, text, chosen)  # downloads the weights where they are not here
        return ours, peer_scores(args.peer_python, source.path, chosen)

    ours, theirs = both(batches)
    apart = routed_apart(ours, theirs)
    left = [b for i, b in enumerate(batches) if i not in apart]
    print(f"{len(batches)} sequences, {len(apart)} of them routed differently")
    if len(apart) > MOST_LEFT_OUT * len(batches):
        report(ours, theirs)
        print(f"FAILED: more than {MOST_LEFT_OUT:.0%} of the sequences are routed differently")
        return 1
    if apart:
        print("with all sequences, not judged:")
        report(ours, theirs)
        print(f"with the {len(left)} others:")
        ours, theirs = both(left)
        assert not routed_apart(ours, theirs), "sequences are independent of each other"
    worst = report(ours, theirs)
    good = worst <= BOUND  # NaN is not
    print(f"largest relative difference {worst:.2e}, {'within' if good else 'ABOVE'} {BOUND:g}")
    return int(not good)


def our_scores(source: Checkpoint, text: CalibrationSet, batches: list[Batch]) -> Measured:
    """REAP from our statistics."""
    engine = ResidentEngine(model := source.load("float32", "cpu"))
    wanted = collecting(unasked("always"))
    collector = ExpertCollector(find_blocks(model), source.groups, text.domains, wanted)
    running = []
    with collector:
        for batch in batches:
            engine.run([batch], collector, backward=False)
            statistics = collector.statistics()
            running.append({g.layer: statistics.view(g)["tokens"] for g in source.groups})
    scores = criterion("reap")(statistics).values
    return Measured(
        scores={g.layer: scores[g.name] for g in source.groups},
        tokens={g.layer: steps([r[g.layer] for r in running]) for g in source.groups},
    )


def peer_scores(python: Path, model: Path, batches: list[Batch]) -> Measured:
    """REAP from llm-compressor's modifier, in its own environment."""
    if any(b.padded for b in batches):
        raise ValueError("the peer counts padding as text: give plain text, which packs without it")
    with tempfile.TemporaryDirectory() as folder:
        tokens, scores, counts = (
            Path(folder, f) for f in ("batches.safetensors", "scores.json", "counts.json")
        )
        save_file({f"batch_{i}": b.input_ids for i, b in enumerate(batches)}, tokens)
        command = [python, WORKER, model, tokens, scores, "--counts", counts]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        return Measured(_read(scores), {k: steps(list(v)) for k, v in _read(counts).items()})


def steps(running: list[torch.Tensor]) -> torch.Tensor:
    """Running totals, one [E] after each sequence, to [S, E] amounts of each sequence."""
    return torch.diff(torch.stack(running), dim=0, prepend=torch.zeros(1, len(running[0])))


def routed_apart(ours: Measured, theirs: Measured) -> set[int]:
    """The sequences in which some expert saw another number of tokens on either side."""
    if ours.tokens.keys() != theirs.tokens.keys():
        raise ValueError(f"layers differ: {sorted(ours.tokens)} and {sorted(theirs.tokens)}")
    differ = torch.stack([(t != theirs.tokens[k]).any(dim=1) for k, t in ours.tokens.items()])
    return set(differ.any(dim=0).nonzero().flatten().tolist())


def report(ours: Measured, theirs: Measured) -> float:
    """Print a line per layer; the largest relative difference of all."""
    differences = relative_differences(ours.scores, theirs.scores)
    print("layer  experts  without tokens  max rel. diff.")
    for layer, difference in sorted(differences.items()):
        unused = int((ours.tokens[layer].sum(dim=0) == 0).sum())
        print(f"{layer:5d}  {len(ours.scores[layer]):7d}  {unused:14d}  {difference:14.2e}")
    return float(torch.tensor(list(differences.values())).max())


def relative_differences(
    ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]
) -> dict[int, float]:
    """Largest |ours - theirs| / |theirs| of each layer; two zeros do not differ."""
    found = {}
    for layer, reference in theirs.items():
        gap = (ours[layer] - reference).abs()
        found[layer] = float(torch.where(gap == 0, gap, gap / reference.abs()).max())
    return found


def _read(path: Path) -> dict[int, torch.Tensor]:
    values = json.loads(path.read_text())
    return {int(layer): torch.tensor(v, dtype=torch.float64) for layer, v in values.items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--text", default="eval/text/calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
