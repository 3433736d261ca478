"""The process in which a result is built anew: `python -m moe_fair.vision.afresh`, see `reload`.

    FOLDER IMAGES OUTPUTS THREADS

It looks for no garbage: nearly all that it makes are modules that it imports, and then it ends.
"""

from __future__ import annotations

import gc
import sys

from moe_fair.core.garbage import end_uncollected


def main(folder: str, asked: str, answered: str, threads: str) -> None:
    """Build the model of a folder, and write what it gives for the images."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file

    from moe_fair.vision.answers import answers
    from moe_fair.vision.checkpoint import open_pruned

    torch.set_num_threads(int(threads))
    model = open_pruned(Path(folder), trust_remote_code=True).model
    save_file({"outputs": answers(model, load_file(asked)["images"]).contiguous()}, answered)


if __name__ == "__main__":
    gc.disable()
    end_uncollected()
    main(*sys.argv[1:])
