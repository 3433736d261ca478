"""One GGUF in llama.cpp: `gguf.sh` builds what it runs.

    python eval/serving/check_gguf.py PROGRAM FOLDER WHICH [--against OTHER] [--how WORDS]

PROGRAM is check_gguf.cpp, built, or check_node.mjs, which node runs; FOLDER is one that
`unequal.py` has made, with WHICH.gguf of one of its checkpoints. Prints a line of JSON, see
`runs.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from runs import row


def main() -> None:
    """Run it, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("which")
    parser.add_argument("--against", default="transformers")
    parser.add_argument("--how", default="")
    args = parser.parse_args()
    expected = json.loads((args.folder / "expected.json").read_text())
    numbers = (expected["short"], len(expected[args.which]["greedy"]), *expected["ids"])
    command = ["node", args.program] if args.program.suffix == ".mjs" else [args.program]
    ended = subprocess.run(
        [*command, args.folder / f"{args.which}.gguf", *map(str, numbers)],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found = json.loads(ended.stdout)
    version = os.environ["LLAMA_CPP_VERSION"]
    print(row("llama.cpp", version, args.folder, args.which, found, args.against, args.how))


if __name__ == "__main__":
    main()
