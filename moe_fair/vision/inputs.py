"""What the settings of a vision run name, opened: the model on its device, and its images."""

from __future__ import annotations

import torch
from torch import nn

from moe_fair.core.garbage import uncollected
from moe_fair.engines.device import pick_device
from moe_fair.engines.oom import out_of_memory
from moe_fair.vision.data import Data, ImageSet, open_data
from moe_fair.vision.graph import logits
from moe_fair.vision.load import Source, example
from moe_fair.vision.run_settings import Subject
from moe_fair.vision.source import open_source
from moe_fair.vision.trace import one_line
from moe_fair.vision.verify import check_finite


def open_inputs(settings: Subject) -> tuple[Source, Data]:
    """The model that the settings name, on its device, and its data, labels as the model has them.

    Raises:
        ValueError: one of them is not there, or they do not fit together.
    """
    torch.manual_seed(settings.seed)  # a function may draw the weights that it gives
    with uncollected():  # the model's library is imported here
        source = open_source(
            settings.model,
            weights=settings.weights_path(),
            image_size=settings.image_size,
            mean=settings.mean,
            std=settings.std,
            logits=settings.logits,
            transforms=settings.transforms,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            allow_pickle=settings.allow_pickle,
        )
    check_finite(source.model)
    source.model.to(pick_device(settings.device))
    data = open_data(settings.data, source.transform)
    data = Data(matched(data.train, source.labels), matched(data.test, source.labels))
    _check_classes(source.model, data, example(source))
    return source, data


def matched(images: ImageSet, names: tuple[str, ...] | None) -> ImageSet:
    """Labels as the model numbers them, where both sides name their classes alike."""
    if names is None or not set(images.classes) <= set(names):
        return images
    places = [names.index(c) for c in images.classes]
    if places == list(range(len(places))):
        return images
    labels = [places[i] for i in images.labels.tolist()]
    return images.relabelled(labels, names)


def _check_classes(model: nn.Module, data: Data, x: torch.Tensor) -> None:
    outputs = classes_of(model, x)
    most = max(int(part.labels.max()) for part in (data.train, data.test))
    if most >= outputs:
        raise ValueError(
            f"{data.train.name} has labels up to {most} and the model has {outputs} outputs"
        )


def classes_of(model: nn.Module, x: torch.Tensor) -> int:
    """How many classes a model tells apart.

    Args:
        x: [S, C, H, W] images in the model's shape.

    Raises:
        ValueError: it does not run on them, or is no classifier.
    """
    try:
        with torch.no_grad():
            shape = logits(model, x.to(next(model.parameters()).device)).shape
    except ValueError:
        raise
    except Exception as e:  # whatever the model's own code raises
        if out_of_memory(e):
            raise
        size = " × ".join(map(str, x.shape))
        raise ValueError(f"the model does not run on images, {size}: {one_line(e)}") from e
    if len(shape) != 2 or shape[0] != len(x):
        raise ValueError(
            f"the model gives {' × '.join(map(str, shape))} numbers for {len(x)} images, and what "
            "is pruned here are classifiers, which give one row of logits for each image"
        )
    return shape[1]
