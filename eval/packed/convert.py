"""Write a whole checkpoint packed, nothing of it cut: what `--save-as` does on the way out.

    python eval/make_full_size.py -o full --layers 8
    python eval/packed/convert.py full full-fp8 fp8      # squares of 128
    python eval/packed/convert.py full full-w4a16 w4a16  # INT4 in groups of 128

Then each is pruned by `eval/bench_full_size.py`, for its memory and time beside bfloat16's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.conversion import Conversion


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("form", choices=["fp8", "w4a16"])
    args = parser.parse_args()
    source = Checkpoint(args.model)
    with torch.no_grad():
        write_model(source, {}, args.output, conversion=Conversion(source, args.form))


if __name__ == "__main__":
    main()
