"""Folders of photos: their order and captions, every kind of image file, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lora2_pack.lora2_core.data.folder import load_folder
from lora2_pack.lora2_core.data.photos import DatasetError, check_photos
from PIL import Image

torch.set_num_threads(1)

PROMPT = "a photo of sks cat"


def picture(size: tuple[int, int] = (70, 66), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_a_folder_comes_in_the_order_of_its_names_with_captions(tmp_path: Path) -> None:
    for seed, name in enumerate(("b.PNG", "a.png", "c.d.webp", "e.bmp")):
        picture(seed=seed).save(tmp_path / name, lossless=True)
    (tmp_path / "a.txt").write_bytes("\ufeffa cat, Zoë\r\n".encode())
    (tmp_path / "c.d.txt").write_text("with a dot\n")
    (tmp_path / "notes.txt").write_text("belongs to nothing")
    (tmp_path / "sub").mkdir()
    loaded, captions, masks = load_folder(tmp_path).lists()
    assert captions == ["a cat, Zoë", "", "with a dot", ""]
    for image, seed in zip(loaded, (1, 0, 2, 3), strict=True):
        expected = torch.from_numpy(np.asarray(picture(seed=seed), np.float32) / 255)
        torch.testing.assert_close(image, expected[None])
    assert [tuple(mask.shape) for mask in masks] == [(1, 66, 70)] * 4
    assert all((mask == 1).all() for mask in masks)


def test_the_rotation_of_a_phone_is_undone(tmp_path: Path) -> None:
    upright = Image.new("RGB", (120, 80), "red")
    upright.paste("blue", (0, 0, 60, 80))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90° clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "x.jpg", exif=exif, quality=95)
    ((image,), _, _) = load_folder(tmp_path).lists()
    assert image.shape == (1, 80, 120, 3)
    assert image[0, 40, 20, 2] > 0.9 > 0.1 > image[0, 40, 20, 0]
    assert image[0, 40, 100, 0] > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (70, 70), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 128), (0, 0, 35, 70))
    clear.convert(mode).save(tmp_path / "x.png")
    ((image,), _, (mask,)) = load_folder(tmp_path).lists()
    assert image.shape == (1, 70, 70, 3)
    assert (image[0, :, 40:] == 1).all()
    assert mask.shape == (1, 70, 70)
    assert not mask[0, :, 40:].any()
    assert (mask[0, :, :30] > 0).all()
    if mode != "P":
        assert float(mask[0, 10, 10]) == pytest.approx(128 / 255)
        assert float(image[0, 10, 10, 0]) == pytest.approx(127 / 255, abs=1 / 255)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "BMP"), ("1", "BMP"), ("P", "BMP"), ("1", "PNG"), ("CMYK", "JPEG")]
)
def test_other_kinds_of_image_are_read(mode: str, kind: str, tmp_path: Path) -> None:
    picture().convert(mode).save(tmp_path / "x.bmp", kind)
    ((image,), _, _) = load_folder(tmp_path).lists()
    with Image.open(tmp_path / "x.bmp") as source:
        expected = torch.from_numpy(np.asarray(source.convert("RGB"), np.float32) / 255)
    torch.testing.assert_close(image[0], expected, rtol=0, atol=1.5 / 255)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    grey = np.full((70, 70), 0x8000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    ((image,), _, _) = load_folder(tmp_path).lists()
    assert float(image.mean()) == pytest.approx(0.5, abs=0.01)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("a cat")
    with pytest.raises(DatasetError, match=f"'{tmp_path.name}' holds no image; put png, jpg"):
        load_folder(tmp_path).lists()


def broken(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG" if kind == "half" else "PNG")
    data = bytearray(buffer.getvalue())
    if kind == "chunk":
        data[33:37] = b"\0\0\1\0"  # a length of the pixel data that leads into its middle
    return {"half": bytes(data[: len(data) // 2]), "empty": b"", "text": b"hello"}.get(
        kind, bytes(data)
    )


@pytest.mark.parametrize(
    "kind",
    [
        "half",
        "empty",
        "text",
        pytest.param(
            "chunk",
        ),
    ],
)
def test_a_broken_image_is_named(kind: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(broken(kind))
    with pytest.raises(DatasetError, match=r"b\.png is not a readable image .*remove it"):
        load_folder(tmp_path).lists()


def test_a_gigantic_image_is_named(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "b.png")
    with pytest.raises(DatasetError, match=r"b\.png"):
        load_folder(tmp_path).lists()


def test_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DatasetError, match=r"a\.txt is not readable UTF-8"):
        load_folder(tmp_path).lists()


def test_a_transparent_folder_trains_where_it_is_opaque(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    cut_out = picture((90, 66)).convert("RGBA")
    cut_out.putalpha(Image.new("L", (90, 66), 0))
    cut_out.paste(picture((45, 66)), (0, 0))
    cut_out.save(tmp_path / "b.png")
    loaded, captions, masks = load_folder(tmp_path).lists()
    opaque, half = check_photos(loaded, captions, PROMPT, masks)
    assert opaque.mask is None
    assert torch.equal(half.mask, torch.cat([torch.ones(66, 45), torch.zeros(66, 45)], 1))


def test_a_wholly_transparent_file_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    Image.new("RGBA", (70, 70), (9, 9, 9, 0)).save(tmp_path / "b.png")
    with pytest.raises(DatasetError, match=r"b\.png is transparent everywhere"):
        load_folder(tmp_path).lists()
