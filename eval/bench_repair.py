"""What the README's example costs beside an earlier version: processor time and held-out loss.

    git worktree add ../before 45506b9
    python eval/bench_repair.py --before ../before --seeds 0 1 2

Both prune the reference model to 40 experts of 60 on given text, in turn, on one thread; figures
are the processes' user time less what their imports take. Results may differ in the repaired
tensors; plans and statistics are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "import moe_fair.cli.app, moe_fair.pipelines.moe, matplotlib.figure, "
    "transformers.models.qwen2_moe.modeling_qwen2_moe"
)
SAME = ("plan.json", "statistics.tensors")  # of a result's moe_fair/


def main() -> None:
    """Measure and print one table."""
    args = _arguments()
    versions = {"before": args.before.resolve(), "now": ROOT}
    imports = {v: min(_seconds(r, ["-c", IMPORTS]) for _ in range(2)) for v, r in versions.items()}
    print("| seed | before, s | now, s | ratio | loss before | loss now | plan and statistics |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            seconds, losses, same = {}, {}, []
            for v, root in versions.items():
                out = Path(folder) / v
                took = _seconds(root, ["-m", "moe_fair.cli", *_command(args, seed), "-o", out])
                seconds[v] = took - imports[v]
                its = json.loads((out / "moe_fair" / "heldout.json").read_text())
                losses[v] = float(its["pruned"]["mean"])
            for name in SAME:
                a, b = ((Path(folder) / v / "moe_fair" / name).read_bytes() for v in versions)
                same.append(a == b)
        rows.append({"seed": seed, "seconds": seconds, "losses": losses, "same": all(same)})
        ratio = seconds["now"] / seconds["before"]
        equal = "the same bytes" if all(same) else "differ"
        print(
            f"| {seed} | {seconds['before']:.1f} | {seconds['now']:.1f} | {ratio:.2f} | "
            f"{losses['before']:.4f} | {losses['now']:.4f} | {equal} |",
            flush=True,
        )
    ratios = [r["seconds"]["now"] / r["seconds"]["before"] for r in rows]
    print(f"\nmedian ratio: {statistics.median(ratios):.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _command(args: argparse.Namespace, seed: int) -> list[Any]:
    """The README's example, from one copy of model and texts."""
    held = ["--heldout", ROOT / "eval" / "text" / "heldout", "--heldout-samples", args.heldout]
    text = ["--calibration", ROOT / "eval" / "text" / "calibration"]
    size = ["--samples", args.samples, "--length", args.length, "--experts", args.experts]
    return ["prune", ROOT / "eval" / "tiny-qwen2-moe", *size, *text, *held, "--seed", seed]


def _seconds(root: Path, command: list[Any]) -> float:
    """User time of Python over this copy of the package.

    Raises:
        SystemExit: it failed; with what it said.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=root, text=True,
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a copy of an earlier version")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=400)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
