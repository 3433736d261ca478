"""Which model on which data: the settings that every vision run has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from moe_fair.core.quote import quote
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import coerce_all, setting, settings_of

# headings of the help screens
SCORE, TARGET, GRADUAL, TRAIN, SPARSE, MODEL, RUN = (
    "Scores and budget",
    "Target (exactly one)",
    "Removal while training, with --method",
    "Fine-tuning",
    "Zeros and repair",
    "Models given as module:function",
    "Running",
)
PRUNE, SPARSIFY = "vision prune", "vision sparsify"
BOTH = (PRUNE, SPARSIFY)


def numbers(option: str) -> Callable[[str], tuple[float, ...]]:
    """What reads an option's numbers with commas."""

    def read(text: str) -> tuple[float, ...]:
        try:
            return tuple(float(t) for t in text.split(","))
        except ValueError:
            raise ValueError(
                f"{option} {text!r}: write numbers with commas, as 0.485,0.456,0.406"
            ) from None

    return read


def given(
    default: Any, help: str, panel: str | None, commands: tuple[str, ...], **more: Any
) -> Any:
    """A setting that help screens show."""
    return setting(default, help, panel=panel, commands=commands, shown=True, **more)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model, data and where they run; kinds of run add their own settings."""

    model: str = given(
        MISSING, "Hub id or folder, module:function, or a pruned checkpoint", None, BOTH,
        flags=("MODEL",),
    )  # fmt: skip
    data: str = given(
        MISSING, "digits, a folder of class folders, or a dataset id[:config][@split]", None, BOTH
    )
    batch_size: int = given(64, "Images per batch", RUN, BOTH, minimum=1)
    seed: int = given(0, "Draws images, directions and the order of training", RUN, BOTH, minimum=0)
    weights: str | None = given(None, "Safetensors file to fill the model with", MODEL, BOTH)
    image_size: int | None = given(
        None, "Side of the images", MODEL, BOTH, usual="timm's or torchvision's, or 32"
    )
    mean: tuple[float, ...] | None = given(
        None, "Of the pixels in 0..1, one number or one a channel", MODEL, BOTH, usual="0.5",
        parse=numbers("--mean"),
    )  # fmt: skip
    std: tuple[float, ...] | None = given(
        None, "Likewise", MODEL, BOTH, usual="0.5", parse=numbers("--std")
    )
    transforms: str | None = given(
        None,
        "module:function that gives what makes a tensor of a picture, in place of --image-size, "
        "--mean and --std",
        MODEL, BOTH,
    )  # fmt: skip
    logits: str | None = given(
        None, "Where in what the model gives they are, by name or number", MODEL, BOTH,
        usual="what is named logits, or all",
    )  # fmt: skip
    revision: str | None = given(None, "Branch, tag or commit on the Hub", RUN, BOTH)
    trust_remote_code: bool = given(False, "Run code that a model brings or names", RUN, BOTH)
    allow_pickle: bool = given(
        False,
        "Where a model has no safetensors, read its pickled weights (.bin): tensors only, nothing "
        "in them is run",
        RUN, BOTH,
    )  # fmt: skip
    device: str = given("auto", "auto, cpu, cuda, ...", RUN, BOTH)

    def __post_init__(self) -> None:
        for name in ("model", "data", "weights"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, str(value))
            elif not isinstance(value, str) and not (name == "weights" and value is None):
                raise ValueError(f"{name} must be text or a path, not {quote(value)}")
        coerce_all(self, finite=False)

    @classmethod
    def check_names(cls, values: Iterable[str]) -> None:
        """Every name is a setting.

        Raises:
            ValueError: one is not; says the nearest.
        """
        check_settings(values, settings_of(cls))

    def plain(self) -> dict[str, Any]:
        """What was set, for JSON."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def weights_path(self) -> Path | None:
        """The file that --weights names."""
        return Path(self.weights) if self.weights else None
