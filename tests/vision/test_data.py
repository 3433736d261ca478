"""Images from digits, folders and data sets: parts that share nothing, labels in order."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from moe_fair.vision.data import _table, open_data, sample
from moe_fair.vision.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(channels=3, size=16)


def test_digits_are_split_by_class_and_share_no_image() -> None:
    data = open_data("digits", Preprocessing(channels=1, size=32))
    assert len(data.train) + len(data.test) == 1797
    train, test = data.train.tensors()[0], data.test.tensors()[0]
    assert train.shape[1:] == test.shape[1:] == (1, 32, 32)
    assert float(train.min()) == -1
    assert float(train.max()) == 1
    shares = data.test.labels.bincount() / torch.bincount(
        torch.cat([data.train.labels, data.test.labels])
    )
    assert float((shares - 0.2).abs().max()) < 0.005
    # the same pixels may be written twice in digits, the same picture in both parts may not
    seen = {tuple(t.flatten().tolist()) for t in test}
    assert sum(tuple(t.flatten().tolist()) in seen for t in train) == 0
    again = open_data("digits", Preprocessing(channels=1, size=32))
    assert torch.equal(again.test.labels, data.test.labels)


def test_a_folder_with_its_own_test_part(pictures: Path) -> None:
    data = open_data(str(pictures), PREPROCESSING)
    assert data.train.classes == ("blue", "green", "red")
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(data.test) == 12
    images, labels = data.test.tensors()
    brightest = images.mean((2, 3)).argmax(1)  # red, green, blue
    assert torch.equal(2 - brightest, labels)


def test_a_folder_without_one_is_split(pictures: Path) -> None:
    data = open_data(str(pictures / "train"), PREPROCESSING)
    assert (len(data.train), len(data.test)) == (18, 6)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]


def test_preprocessing_is_its_formula() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    made = Preprocessing(3, 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))(Image.fromarray(pixels))
    wanted = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    np.testing.assert_allclose(made.numpy(), wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-7)


def test_a_data_set_of_the_hub_by_its_features() -> None:
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    rows = datasets.Dataset.from_dict(
        {"picture": pictures, "kind": [1, 0, 1, 1]},
        features=datasets.Features(
            {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    images = _table(rows, "some/set", PREPROCESSING)
    assert images.classes == ("a", "b")
    assert images.labels.tolist() == [1, 0, 1, 1]
    assert images[3][0][0, 0, 0] == pytest.approx((3 / 255 - 0.5) / 0.5)
    with pytest.raises(ValueError, match="needs one image column"):
        _table(rows.remove_columns("picture"), "some/set", PREPROCESSING)


def test_a_sample_has_equally_many_of_each_class(pictures: Path) -> None:
    train = open_data(str(pictures), PREPROCESSING).train
    _, labels = sample(train, 12, seed=0)
    assert len(labels) == 12
    images, labels = sample(open_data("digits", PREPROCESSING).train, 640, seed=0)
    assert labels.bincount().tolist() == [64] * 10
    again, _ = sample(open_data("digits", PREPROCESSING).train, 640, seed=0)
    assert torch.equal(images, again)


@pytest.mark.parametrize(
    ("spec", "match"),
    [("./nowhere", "no such folder"), ("no/such-data-set-here", "no data set of the Hub")],
)
def test_what_is_not_there(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_data(spec, PREPROCESSING)


def test_a_folder_without_class_folders(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="one sub-folder for each class"):
        open_data(str(tmp_path), PREPROCESSING)


def test_numbers_of_the_preprocessing_are_checked() -> None:
    with pytest.raises(ValueError, match="--mean has 2 values; the model has 3"):
        Preprocessing(3, 32, mean=(0.1, 0.2))
    with pytest.raises(ValueError, match="not above 0"):
        Preprocessing(3, 32, std=(0.0,))
