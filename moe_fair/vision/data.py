"""Labelled images: scikit-learn's digits, a folder of class folders, or a data set of the Hub.

    digits                      1,797 handwritten digits, bundled with scikit-learn
    DIR                         DIR/train/CLASS/*.png and DIR/test (or val, validation), or
                                DIR/CLASS/*.png, of which a fifth is held out
    id[:config][@split]         a data set with an image and a label column

Every set comes in two parts, for scoring and training and for testing, which share no image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_fair.vision.pictures import check_files
from moe_fair.vision.preprocessing import Transform

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
TEST_NAMES = ("test", "val", "validation")
HELD_OUT = 0.2  # where a source has no test part of its own
SPLIT_SEED = 0
READERS = 8  # most threads that read pictures


class ImageSet(Dataset):
    """Images that are read when asked for.

    Attributes:
        labels: [S] int64.
        classes: names of the classes.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Transform,
        name: str,
    ) -> None:
        self.labels = torch.tensor(list(labels), dtype=torch.int64)
        self.classes = tuple(classes)
        self.name = name
        self._read, self._transform = read, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._transform(self._read(i)), int(self.labels[i])

    def part(self, ids: Sequence[int]) -> ImageSet:
        """The images of these ids."""
        picked = list(ids)
        return ImageSet(
            lambda i: self._read(picked[i]),
            self.labels[picked].tolist(),
            self.classes,
            self._transform,
            self.name,
        )

    def relabelled(self, labels: Sequence[int], classes: Sequence[str]) -> ImageSet:
        """The same images under other labels."""
        return ImageSet(self._read, labels, classes, self._transform, self.name)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """[S, C, H, W] and [S]: everything in memory."""
        return next(self.batches(len(self)))

    def batches(
        self, size: int, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """[size, C, H, W] and [size], the last batch what is left.

        Threads read pictures ahead of what is asked for, which Pillow does beside other work.

        Args:
            order: ids; None: all as they come.
        """
        order = range(len(self)) if order is None else order
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        workers = min(READERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[list[Future[tuple[Tensor, int]]]] = deque()
            try:
                for n in range(len(batches) + 1):
                    if n < len(batches):
                        ahead.append([pool.submit(self.__getitem__, i) for i in batches[n]])
                    if n:
                        read = [f.result() for f in ahead.popleft()]
                        yield torch.stack([x for x, _ in read]), torch.tensor([y for _, y in read])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Data:
    """The part to score and train on, and the part to test on."""

    train: ImageSet
    test: ImageSet


def open_data(spec: str, transform: Transform) -> Data:
    """The images that a `--data` value names.

    Raises:
        ValueError: nothing of that name; says what was looked for.
    """
    if spec == "digits":
        return _digits(transform)
    if Path(spec).is_dir():
        return _folder(Path(spec), transform)
    if spec.startswith((".", "/", "~")) or Path(spec).exists():
        raise ValueError(f"--data {spec}: no such folder of images")
    return _dataset(spec, transform)


def draw(images: ImageSet, count: int, seed: int) -> Tensor:
    """[S, C, H, W] images for calibration, drawn without a look at their labels."""
    ids = np.random.default_rng(seed).permutation(len(images))[:count]
    return images.part(sorted(ids.tolist())).tensors()[0]


def sample(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[S, C, H, W] and [S]: `count` images for scoring, equally many of every class drawn.

    With many classes only as many of them as leave 32 images each: a distance between two classes
    needs samples of both.

    Raises:
        ValueError: fewer than two classes.
    """
    generator = np.random.default_rng(seed)
    labels = images.labels.numpy()
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"{images.name} has {len(present)} class; scores need two or more")
    take = min(len(present), max(2, count // 32))
    drawn = np.sort(generator.choice(present, take, replace=False))
    each = max(2, count // take)
    ids: list[int] = []
    for c in drawn:
        of_class = np.flatnonzero(labels == c)
        ids += generator.permutation(of_class)[:each].tolist()
    return images.part(generator.permutation(ids).tolist()).tensors()


def _digits(transform: Transform) -> Data:
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ValueError("digits come with scikit-learn: pip install 'moe_fair[vision]'") from e
    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    whole = ImageSet(
        lambda i: Image.fromarray(pixels[i]),
        found.target.tolist(),
        [str(c) for c in range(10)],
        transform,
        "digits",
    )
    return _split(whole)


def _folder(folder: Path, transform: Transform) -> Data:
    train = folder / "train"
    if not train.is_dir():
        return _split(_class_folders(folder, transform))
    found = _class_folders(train, transform)
    for name in TEST_NAMES:
        if (folder / name).is_dir():
            test = _class_folders(folder / name, transform)
            if not set(test.classes) <= set(found.classes):
                raise ValueError(f"{folder / name} has classes that {train} has not")
            ids = [found.classes.index(test.classes[c]) for c in test.labels.tolist()]
            return Data(found, test.relabelled(ids, found.classes))
    return _split(found)


def _class_folders(folder: Path, transform: Transform) -> ImageSet:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        here = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += here
        labels += [label] * len(here)
    if not files:
        raise ValueError(
            f"{folder} holds no images in class folders (CLASS/*.png, .jpg, ...): "
            "give a folder with one sub-folder for each class"
        )
    filled = set(labels)
    if empty := [name for i, name in enumerate(classes) if i not in filled]:
        raise ValueError(
            f"no images in class folders {', '.join(empty[:10])}{' ...' * (len(empty) > 10)} of "
            f"{folder}: put some in, or remove them"
        )
    check_files(files, folder)

    def read(i: int) -> Any:
        from PIL import Image

        with Image.open(files[i]) as image:
            image.load()
            return image

    return ImageSet(read, labels, classes, transform, str(folder))


def _dataset(spec: str, transform: Transform) -> Data:
    import datasets

    where, _, split = spec.partition("@")
    name, _, config = where.partition(":")
    try:
        parts = datasets.load_dataset(name, config or None)
    except Exception as e:
        raise ValueError(
            f"--data {spec}: not `digits`, not a folder, and no data set of the Hub could be "
            f"loaded ({type(e).__name__}: {' '.join(str(e).split())[:160]})"
        ) from e
    train = split or "train"
    if train not in parts:
        raise ValueError(f"--data {spec}: no split {train!r}; there are {', '.join(parts)}")
    test = next((n for n in TEST_NAMES if n in parts and n != train), None)
    first = _table(parts[train], spec, transform)
    return Data(first, _table(parts[test], spec, transform)) if test else _split(first)


def _table(rows: Any, spec: str, transform: Transform) -> ImageSet:
    import datasets

    features = rows.features
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if len(images) != 1 or not labels:
        raise ValueError(
            f"--data {spec}: needs one image column and a class label column; there are "
            f"{', '.join(features)}"
        )
    label = "label" if "label" in labels else labels[0]
    return ImageSet(
        lambda i: rows[i][images[0]], rows[label], features[label].names, transform, spec
    )


def _split(whole: ImageSet) -> Data:
    """A fifth of every class held out, the same fifth each time."""
    generator = np.random.default_rng(SPLIT_SEED)
    train: list[int] = []
    test: list[int] = []
    labels = whole.labels.numpy()
    for c in np.unique(labels):
        ids = generator.permutation(np.flatnonzero(labels == c))
        held = max(1, round(HELD_OUT * len(ids)))
        test += ids[:held].tolist()
        train += ids[held:].tolist()
    return Data(whole.part(sorted(train)), whole.part(sorted(test)))
