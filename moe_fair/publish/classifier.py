"""A pruned image classifier in a format that needs neither its code nor moe_fair.

    onnx           ONNX with its weights inside, for onnxruntime and what reads ONNX
    exported       an ExportedProgram of torch.export (.pt2), for torch and AOTInductor
    torchscript    a traced module, for LibTorch

What was written is read again, by onnxruntime or torch, and its outputs are compared with the
checkpoint's, one image at a time and several, before the file gets its name.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_fair.core.output import partial_path
from moe_fair.publish.made_file import check_file
from moe_fair.vision.checkpoint import open_pruned
from moe_fair.vision.graph import logits
from moe_fair.vision.load import example

CLOSE = 1e-4  # of the largest output; other kernels add up in another order
BATCHES = (1, 3)  # images at a time that are compared
NEEDS = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "logits"

Write = Callable[[nn.Module, Tensor, Path, bool], None]
Read = Callable[[Path, Tensor], Tensor]


@dataclass(frozen=True)
class ExportedClassifier:
    """What was written.

    Attributes:
        file: in its format.
        bytes: of it.
        shape: of the images that it takes; "batch" where their number is free.
        difference: largest, from the checkpoint's outputs, relative to the largest of them.
    """

    file: Path
    bytes: int
    shape: tuple[int | str, ...]
    difference: float


def export_classifier(
    out: Path,
    to: str,
    *,
    file: Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> ExportedClassifier:
    """Write a checkpoint of `vision prune` or `vision sparsify` in another format.

    Args:
        out: the checkpoint.
        to: one of FORMATS.
        file: to write; OUT.onnx, OUT.pt2 or OUT.pt beside it.
        trust_remote_code: see `load_pruned`.

    Raises:
        ValueError: no such format, packages that are missing, no checkpoint, a file that cannot be
            written, or a model that the exporter cannot take.
        RuntimeError: the file gives other outputs than the checkpoint.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: choose from {', '.join(FORMATS)}")
    suffix = FORMATS[to][0]
    if to == "onnx" and (missing := [n for n in NEEDS if find_spec(n) is None]):
        raise ValueError(f'--to onnx needs {missing[0]}: pip install "moe_fair[onnx]"')
    file = file or out.absolute().with_name(f"{out.absolute().name}{suffix}")
    check_file(file)
    source = open_pruned(out, trust_remote_code=trust_remote_code)
    module = _Logits(source.model.float()).eval()
    images = example(source, max(BATCHES))
    work = partial_path(file.with_name(f"{file.name}.{os.getpid()}"))
    work = work.with_name(work.name + suffix)  # exporters look at the ending
    try:
        free, difference = _written(to, module, images, work, say)
        work.replace(file)
    finally:
        work.unlink(missing_ok=True)
    shape = ("batch" if free else 1, *images.shape[1:])
    return ExportedClassifier(file, file.stat().st_size, shape, difference)


class _Logits(nn.Module):
    """A classifier that gives its logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.model, images)


def _written(
    to: str, module: nn.Module, images: Tensor, file: Path, say: Callable[[str], None]
) -> tuple[bool, float]:
    """Write for any number of images, or else for one, and compare.

    Returns:
        whether any number will do; what `_compared` found.

    Raises:
        ValueError: the exporter takes the model in neither way.
        RuntimeError: the file for one image gives other outputs.
    """
    _, write, read = FORMATS[to]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of exporters, to those who write them
        try:
            write(module, images[:2], file, True)
            return True, _compared(read, module, images, file, BATCHES)
        except Exception as e:  # whatever meets the model's own code
            reason = _first(e)
        try:
            write(module, images[:1], file, False)
        except Exception as e:
            raise ValueError(f"this model cannot be exported: {_first(e)}") from e
        difference = _compared(read, module, images, file, BATCHES[:1])
    say(f"note: for one image at a time, since with any number of them: {reason}")
    return False, difference


def _compared(
    read: Read, module: nn.Module, images: Tensor, file: Path, counts: Sequence[int]
) -> float:
    """The largest relative difference between the file's outputs and the module's.

    Raises:
        RuntimeError: it is not that of rounding.
    """
    largest = 0.0
    for count in counts:
        wanted, found = module(images[:count]), read(file, images[:count])
        if found.shape != wanted.shape:
            raise RuntimeError(
                f"the exported model gives {list(found.shape)} for {count} images in place of "
                f"{list(wanted.shape)}; nothing was kept"
            )
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= CLOSE:
            raise RuntimeError(
                f"the exported model differs by {difference:.1g} of the largest output from the "
                "checkpoint; nothing was kept"
            )
        largest = max(largest, difference)
    return largest


def _dynamic(free: bool) -> tuple[dict[int, object]] | None:
    return ({0: torch.export.Dim("batch", min=1)},) if free else None


def _write_program(module: nn.Module, images: Tensor, file: Path, free: bool) -> None:
    program = torch.export.export(module, (images,), dynamic_shapes=_dynamic(free))
    torch.export.save(program, file)


def _read_program(file: Path, images: Tensor) -> Tensor:
    return torch.export.load(file).module()(images)


def _write_onnx(module: nn.Module, images: Tensor, file: Path, free: bool) -> None:
    # that torchvision's operators are not registered, to those who have none
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    made = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        dynamic_shapes=_dynamic(free),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert made is not None
    made.save(file, external_data=False)


def _read_onnx(file: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [found] = session.run([OUTPUT], {INPUT: images.numpy()})
    return torch.from_numpy(found)


def _write_script(module: nn.Module, images: Tensor, file: Path, free: bool) -> None:
    torch.jit.save(torch.jit.trace(module, (images,), check_trace=False), file)


def _read_script(file: Path, images: Tensor) -> Tensor:
    return torch.jit.load(file)(images)


def _first(e: Exception) -> str:
    """The first line of an exporter's complaint."""
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__


# name -> ending of its files, how it is written, how it is read again
FORMATS: dict[str, tuple[str, Write, Read]] = {
    "onnx": (".onnx", _write_onnx, _read_onnx),
    "exported": (".pt2", _write_program, _read_program),
    "torchscript": (".pt", _write_script, _read_script),
}
