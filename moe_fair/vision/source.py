"""The model that a vision run starts from, whichever kind of name it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_fair.vision.checkpoint import PRUNED_FILE, open_pruned
from moe_fair.vision.load import (
    SIZE,
    Source,
    build,
    first_channels,
    load_weights,
    open_transformers,
    own_preprocessing,
    parse_function,
)
from moe_fair.vision.preprocessing import called, published


def open_source(
    spec: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    logits: str | None = None,
    transforms: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Source:
    """The model that MODEL names.

    Args:
        weights: safetensors file of a `module:function` model's weights.
        allow_pickle: also read pickled weights, their tensors alone; see `engines.pickles`.
        logits: where in what a `module:function` model gives they are, by name or number.
        image_size, mean, std: of a model without an image processor; by default what timm or
            torchvision has for it, or 32, 0.5 and 0.5.
        transforms: `module:function` that gives what makes a tensor of a PIL image, in their place.

    Raises:
        ValueError: there is no such model; says what was tried.
    """
    own = {"size": image_size, "mean": mean, "std": std}
    pruned = (Path(spec) / PRUNED_FILE).is_file()
    function = None if pruned else parse_function(spec)
    for name, value in (("weights", weights), ("logits", logits)):
        if value is not None and function is None:
            raise ValueError(f"--{name} belongs to a `module:function` model; others bring theirs")
    if transforms is not None:
        if pruned:
            raise ValueError("--transforms: a pruned checkpoint brings its own")
        if any(v is not None for v in own.values()):
            raise ValueError("--transforms is in place of --image-size, --mean and --std")
        spec_of = parse_function(transforms)
        if spec_of is None:
            raise ValueError(f"--transforms {transforms!r}: write it as module:function")
        source = open_source(
            spec, weights=weights, logits=logits, revision=revision,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )  # fmt: skip
        return replace(
            source, transform=called(spec_of), preprocessing=None, processor=None,
            transforms=spec_of,
        )  # fmt: skip
    if pruned:
        return open_pruned(Path(spec), trust_remote_code=trust_remote_code)
    if function:
        base = {"kind": "function", **function, **({"logits": logits} if logits else {})}
        model = build(base, trusted=True)
        if weights is not None:
            load_weights(model, weights, allow_pickle=allow_pickle)
        given = {**published(model, base), **{k: v for k, v in own.items() if v is not None}}
        preprocessing = own_preprocessing(first_channels(model, given.get("size", SIZE)), given)
        return Source(model.eval(), base, preprocessing, preprocessing, None, None)
    return open_transformers(spec, own, revision, trust_remote_code, allow_pickle)
