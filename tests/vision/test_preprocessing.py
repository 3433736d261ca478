"""Pictures made ready as the model's package does it, or by the user's own function."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_fair.vision.checkpoint import load_pruned, open_pruned, save_pruned
from moe_fair.vision.data import ImageSet
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.source import open_source

SIZES = ((300, 200), (201, 333), (64, 64))
NET = "vision.architectures:small"
BROKEN = {
    "nothing": "gives int; it must give a function",
    "flat": r"makes torch.float32 \[5\] of a picture",
    "whole": r"makes torch.uint8 \[3, 4, 4\]",
}


def halves() -> Any:
    return lambda image: torch.full((3, 8, 8), image.size[0] / 2)


def nothing() -> int:
    return 3


def flat() -> Any:
    return lambda image: torch.zeros(5)


def whole() -> Any:
    return lambda image: torch.zeros(3, 4, 4, dtype=torch.uint8)


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_middle_of_the_picture() -> None:
    """Every pixel by its place: a column of an image 8 wide and 4 high holds its number."""
    image = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (4, 1)))
    made = Preprocessing(1, 2, mean=(0.0,), std=(1.0,), crop=0.5, squash=False, resample="nearest")(
        image
    )
    assert (made * 255).round().tolist() == [[[3, 4], [3, 4]]]  # 8 × 4 is as it was
    made = Preprocessing(1, 2, mean=(0.0,), std=(1.0,), crop=0.5, resample="nearest")(image)
    assert (made * 255).round().tolist() == [[[3, 5], [3, 5]]]  # 4 × 4: columns 1, 3, 5, 7
    for wrong in ({"crop": 0.0}, {"crop": 1.5}, {"resample": "sharp"}):
        with pytest.raises(ValueError, match=r"crop of|no resampling"):
            Preprocessing(1, 2, **wrong)  # type: ignore[arg-type]


def test_torchvisions_weights() -> None:
    models = pytest.importorskip("torchvision.models")
    from moe_fair.vision.preprocessing import _torchvision

    for name in ("resnet50", "swin_v2_t", "efficientnet_b0", "inception_v3"):
        preset = models.get_model_weights(name).DEFAULT.transforms()
        ours = Preprocessing(3, **_torchvision(name, "DEFAULT"))
        for size in SIZES:
            torch.testing.assert_close(ours(photo(*size)), preset(photo(*size)), rtol=0, atol=2e-6)


def test_timms_configuration() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "levit_128s", "efficientvit_b0", "test_vit"):
        source = open_source(f"timm:create_model('{name}', num_classes=10)")
        its = timm.data.resolve_model_data_config(source.model)
        theirs = timm.data.create_transform(**its, is_training=False)
        for size in SIZES:
            made = source.transform(photo(*size))
            torch.testing.assert_close(made, theirs(photo(*size)), rtol=0, atol=2e-6)
    smaller = open_source("timm:create_model('resnet10t', num_classes=10)", image_size=32)
    assert smaller.transform(photo(*SIZES[0])).shape == (3, 32, 32)


def test_a_function_of_the_users(tmp_path: Path) -> None:
    source = open_source(NET, transforms="vision.test_preprocessing:halves")
    assert torch.equal(source.transform(photo(6, 4)), torch.full((3, 8, 8), 3.0))
    save_pruned(source.model, source, [], tmp_path)
    again = open_pruned(tmp_path, trust_remote_code=True)
    assert torch.equal(again.transform(photo(6, 4)), torch.full((3, 8, 8), 3.0))
    with pytest.raises(ValueError, match=r"wants to run vision\.architectures:small"):
        load_pruned(tmp_path)
    known = open_source(
        "moe_fair.vision.zoo:resnet20", transforms="vision.test_preprocessing:halves"
    )
    (tmp_path / "known").mkdir()
    save_pruned(known.model, known, [], tmp_path / "known")
    unasked = open_pruned(tmp_path / "known")  # the model can be had; the code does not run
    with pytest.raises(ValueError, match="test_preprocessing:halves; if you know that code"):
        unasked.transform(photo(6, 4))


@pytest.mark.parametrize("name", BROKEN)
def test_functions_that_do_not_do(name: str) -> None:
    with pytest.raises(ValueError, match=BROKEN[name]):
        open_source(NET, transforms=f"vision.test_preprocessing:{name}").transform(photo(4, 4))


def test_what_cannot_be_called(tmp_path: Path) -> None:
    for spec, said in (
        ("no_such_module_here:f", "No module named"),
        ("vision.test_preprocessing:no_such", "no attribute"),
        ("vision.test_preprocessing:halves(1)", "positional argument"),
        ("halves", "write it as module:function"),
    ):
        with pytest.raises(ValueError, match=f"--transforms.*{said}"):
            open_source(NET, transforms=spec)
    with pytest.raises(ValueError, match="in place of --image-size"):
        open_source(NET, transforms="vision.test_preprocessing:halves", image_size=8)
    source = open_source(NET)
    save_pruned(source.model, source, [], tmp_path)
    with pytest.raises(ValueError, match="brings its own"):
        open_source(str(tmp_path), transforms="vision.test_preprocessing:halves")


def test_pictures_are_read_ahead_in_order() -> None:
    lock, asked = threading.Lock(), []

    def read(i: int) -> int:
        with lock:
            asked.append(i)
        if i == 97:
            raise ValueError("picture 97 is broken")
        return i

    images = ImageSet(read, range(100), ["a"] * 100, lambda i: torch.full((1,), float(i)), "x")
    order = [*range(50, 10, -1), 7]
    found = list(images.batches(16, order))
    assert [len(x) for x, _ in found] == [16, 16, 9]
    assert torch.cat([x for x, _ in found]).flatten().tolist() == order
    assert torch.cat([y for _, y in found]).tolist() == order
    asked.clear()
    some = images.batches(10)
    next(some)
    some.close()
    assert max(asked) < 20  # one batch ahead, no more
    with pytest.raises(ValueError, match="picture 97 is broken"):
        list(images.batches(10))
