"""Files of every kind as the model is given them, and what is wrong with a folder of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_fair.vision.data import open_data
from moe_fair.vision.load import processed
from moe_fair.vision.pictures import converted
from moe_fair.vision.preprocessing import Preprocessing

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = Preprocessing(channels=1, size=8, mean=(0.0,), std=(1.0,))
RGB = Preprocessing(channels=3, size=8, mean=(0.0,), std=(1.0,))


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Image.Image:
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as found:
        found.load()
        return found


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_not_all_white(tmp_path: Path, name: str) -> None:
    image = saved(tmp_path, Image.fromarray((RAMP * 65535).astype(np.uint16)), name)
    for made in (GREY(image)[0], RGB(image)[2]):
        np.testing.assert_allclose(made.numpy(), RAMP, atol=1 / 255)


def test_floats_are_shares(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "a.tif")
    np.testing.assert_allclose(GREY(image)[0].numpy(), RAMP, atol=1 / 255)
    for wrong in (RAMP * 200, RAMP - 0.5, RAMP * np.nan):
        with pytest.raises(ValueError, match=r"floating point pixels outside of 0\.\.1"):
            GREY(Image.fromarray(wrong.astype(np.float32)))
    with pytest.raises(ValueError, match="32-bit whole numbers"):
        GREY(Image.fromarray((RAMP * 1e6).astype(np.int32)))


def test_pictures_are_upright(tmp_path: Path) -> None:
    turned = Image.fromarray(COLOURS)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    image = saved(tmp_path, turned, "a.png", exif=exif)
    wanted = np.rot90(COLOURS, -1) / 255
    np.testing.assert_allclose(RGB(image).numpy(), wanted.transpose(2, 0, 1), atol=1e-6)


def test_what_is_transparent_is_white_whatever_lies_below(tmp_path: Path) -> None:
    alpha = np.full((8, 8, 1), 255, dtype=np.uint8)
    alpha[:4] = 0
    image = saved(tmp_path, Image.fromarray(np.concatenate([COLOURS, alpha], 2)), "a.png")
    made = RGB(image).numpy().transpose(1, 2, 0)
    assert (made[:4] == 1).all()
    np.testing.assert_allclose(made[4:], COLOURS[4:] / 255, atol=1e-6)
    palette = Image.fromarray((RAMP > 0.5).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 255, 255, 0, 0])
    assert RGB(saved(tmp_path, palette, "b.png"))[:, 0, 0].tolist() == [0, 0, 1]
    clear = saved(tmp_path, palette, "c.png", transparency=0)
    assert RGB(clear)[:, 0, 0].tolist() == [1, 1, 1]
    assert RGB(clear)[:, 7, 7].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "1", "L", "LA"])
def test_other_modes_keep_their_colours(mode: str) -> None:
    flat = Image.new("RGB", (8, 8), (255, 255, 255) if mode == "1" else (200, 200, 200))
    made = RGB(flat.convert(mode))
    assert made.shape == (3, 8, 8)
    np.testing.assert_allclose(made.numpy(), np.asarray(flat)[0, 0, 0] / 255, atol=0.02)


def test_usual_pictures_keep_every_bit() -> None:
    image = Image.fromarray(COLOURS)
    assert np.array_equal(np.asarray(converted(image, "RGB")), COLOURS)
    assert np.array_equal(np.asarray(converted(image, "L")), np.asarray(image.convert("L")))


def test_a_processor_sees_the_same() -> None:
    def processor(images: Image.Image, return_tensors: str) -> dict:
        return {"pixel_values": [np.asarray(images)]}

    made = processed(processor)(Image.fromarray((RAMP * 65535).astype(np.uint16)))
    np.testing.assert_allclose(np.asarray(made)[:, :, 1] / 255, RAMP, atol=1 / 255)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.roll(COLOURS, i, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.bmp", "x.webp", "x.tif"])
def test_damaged_files_are_named_before_anything_is_read(folder: Path, name: str) -> None:
    large = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = folder / "b" / name
    Image.fromarray(large).save(file)
    open_data(str(folder), RGB)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not an image", b""):
        file.write_bytes(damaged)
        (folder / "a" / "0.png").write_bytes(b"no")
        with pytest.raises(ValueError, match=rf"2 of 9 images .*cannot be read: .*0\.png.*{name}"):
            open_data(str(folder), RGB)


def test_a_flipped_byte_within_a_png(folder: Path) -> None:
    file = folder / "b" / "1.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"1 of 8 images .*1\.png"):
        open_data(str(folder), RGB)


def test_pixels_without_a_known_range_are_found_too(folder: Path) -> None:
    Image.fromarray((RAMP * 200).astype(np.float32)).save(folder / "a" / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif \(floating point pixels"):
        open_data(str(folder), RGB)


def test_empty_class_folders_are_named(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "d").mkdir()
    (folder / "d" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"no images in class folders c, d of"):
        open_data(str(folder), RGB)
