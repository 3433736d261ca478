"""Whether a model comes back from its files as the one that was saved.

Once before anything is measured, where the model's own code is asked (`check_reloads`), and once
with the result, in a process that knows nothing but its files (`checked_afresh`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_fair.engines.oom import out_of_memory
from moe_fair.vision.answers import answers, same
from moe_fair.vision.apart import Elsewhere, Ended
from moe_fair.vision.checkpoint import open_pruned, save_pruned
from moe_fair.vision.load import Source
from moe_fair.vision.trace import one_line


def check_reloads(source: Source, images: Tensor) -> None:
    """Save the model, build it again in this process and compare.

    Raises:
        ValueError: it cannot be saved or built, or answers otherwise, also to the same image.
    """
    images = images[:1]
    try:
        wanted = answers(source.model, images)
    except Exception as e:  # of the model's own code
        if out_of_memory(e):
            raise
        raise ValueError(f"the model does not run on one image: {one_line(e)}") from e
    if len(wanted) != 1:
        raise ValueError(f"the model does not run on one image: it gives {len(wanted)} rows for it")
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_pruned(source.model, source, source.history, Path(folder))
            again = open_pruned(Path(folder), trust_remote_code=True).model
        except Exception as e:  # of the model's own code as well
            raise ValueError(
                f"the model cannot be saved and built again ({type(e).__name__}: "
                f"{' '.join(str(e).split())[:200]}), so no result could be read"
            ) from e
        found = answers(again, images)
    if same(wanted, found):  # so it draws no numbers either
        return
    if not same(wanted, answers(source.model, images)):
        raise ValueError(
            "the model gives other outputs each time it sees the same images: it draws random "
            "numbers in evaluation too (a functional dropout without training=self.training?), so "
            "nothing could be proven of a cut"
        )
    raise ValueError(
        "the model, saved and built again, gives other outputs: something that it computes "
        "with is in none of its parameters and persistent buffers (layers in a plain list, "
        "say), so no result could be read"
    )


@contextmanager
def checked_afresh(
    folder: Path, model: nn.Module, images: Tensor, apart: Elsewhere | None = None
) -> Iterator[None]:
    """Build the result in a process of its own, and compare it with the model that was made.

    The process works while the block within does, which leaves the model's files as they are.

    Args:
        apart: of `set_apart`; what its process does not build, one that is started now does.

    Raises:
        RuntimeError: it cannot be built there, or answers otherwise.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "images.safetensors", Path(place) / "outputs.safetensors"
        save_file({"images": images.cpu().contiguous()}, asked)
        arguments = [str(folder.resolve()), str(asked), str(answered), str(torch.get_num_threads())]
        with (apart or _elsewhere)(arguments) as ended:
            yield
            done = ended()
        wanted = answers(model, images)
        if not done.returncode and same(wanted, load_file(answered)["outputs"]):
            return
        if apart is not None:
            with _elsewhere(arguments) as ended:
                done = ended()
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(
                f"the result cannot be built in a process of its own and stays in {folder}: {said}"
            )
        if same(wanted, load_file(answered)["outputs"]):
            return
    raise RuntimeError(
        f"the result, built in a process of its own, gives other outputs than the model that "
        f"was made and stays in {folder}"
    )


@contextmanager
def _elsewhere(
    arguments: list[str],
) -> Iterator[Ended]:
    """`afresh` in a process of its own, which finds the code that this one can import.

    It ends with the block; what is yielded waits for it.
    """
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with subprocess.Popen(
        [sys.executable, "-m", "moe_fair.vision.afresh", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:

        def ended() -> subprocess.CompletedProcess[str]:
            said = process.communicate()
            return subprocess.CompletedProcess(process.args, process.returncode, *said)

        try:
            yield ended
        finally:
            process.kill()
