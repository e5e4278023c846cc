"""What of a folder is read, how often, and what is left out by which words."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.data.folder import load_folder, watched_files
from lora2_pack.lora2_core.data.photos import DatasetError, check_photos
from PIL import Image

OTHER_FOLDER = "a folder; those called like 5_cat are read, or choose it itself"


def put(root: Path, *names: str) -> Path:
    """A picture each, whose brightness is its place in ``names``."""
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), shade).save(root / name, "PNG")
    return root


def shades(root: Path) -> list[int]:
    return [round(float(image.mean()) * 255) for image in load_folder(root).images]


def test_hidden_files_and_those_of_systems_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "cat.jpg", ".trash/x.png", "__MACOSX/cat.jpg", ".cache.png")
    for name in ("._cat.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "._cat.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    found = load_folder(tmp_path)
    assert (len(found.images), found.captions, found.notes) == (1, [""], [])


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "album.png/b.png")
    assert shades(tmp_path) == [0]
    assert load_folder(tmp_path).notes == [f"Left out: album.png ({OTHER_FOLDER})."]
    assert shades(tmp_path / "album.png") == [1]


@pytest.mark.parametrize(
    "name",
    ["a.PNG", "a.Jpg", "a.JPEG", "a.jfif", "a.JPE", "a.tif", "a.TIFF", "a.gif", "a.dib", "a.avif",
     "a.heic", "a.HEIF", "a.jxl", "a.apng"],
)  # fmt: skip
def test_every_ending_is_read_whatever_the_kind(name: str, tmp_path: Path) -> None:
    assert shades(put(tmp_path, "0/0", name)) == [1]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("b.psd", b"8BPS", "not read; save it as PNG"),
        ("b.SVG", b"<svg/>", "not read; save it as PNG"),
        ("b.jp2", b"", "not read; save it as PNG"),
        ("b.NEF", b"II*\0", "raw pictures of a camera are not read; save them as PNG or JPEG"),
        ("b", b"\xff\xd8\xff\xe0", "JPEG by another ending; rename it"),
        ("b.jpg.bak", b"\xff\xd8\xff\xe0", "JPEG by another ending; rename it"),
        ("b.bin", b"II*\0", "TIFF by another ending; rename it"),
    ],
)
def test_other_pictures_are_left_out_by_name(name: str, data: bytes, reason: str, tmp_path: Path):
    put(tmp_path, "a.png")
    (tmp_path / name).write_bytes(data)
    assert load_folder(tmp_path).notes == [f"Left out: {name} ({reason})."]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"holds no image; put png, .*Left out: b") as caught:
        load_folder(tmp_path)
    assert str(caught.value).endswith(f"Left out: {name} ({reason}).")


def test_what_is_no_picture_is_not_spoken_of(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in ("a.npz", "model.safetensors", "readme.md", "song.mp3", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"something")
    os.mkfifo(tmp_path / "pipe")
    assert load_folder(tmp_path).notes == []


def test_names_in_a_note_are_few_and_in_one_line(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in (*(f"b{n}.psd" for n in range(7)), "a\n\u202e.psd", "0" * 200 + ".psd"):
        (tmp_path / name).write_bytes(b"")
    (note,) = load_folder(tmp_path).notes
    long = "0" * 44 + "…" + "0" * 11 + ".psd"
    assert note == (
        f"Left out: {long}, a??.psd, b0.psd, b1.psd, b2.psd and 4 more (not read; save it as PNG)."
    )


# --- repeats ----------------------------------------------------------------------------------


def test_repeats_are_taken_in_proportion(tmp_path: Path) -> None:
    put(tmp_path, "top.png", "10_cat/a.png", "10_cat/b.png", "4_/c.png", "02_x_y/d.png")
    found = load_folder(tmp_path)
    assert list(found.repeats) == [1, 2, 10, 10, 4]
    assert found.notes == [
        "Repeats: the folder itself 1 (1 photo), 02_x_y 2 (1 photo), 10_cat 10 (2 photos), "
        "4_ 4 (1 photo)."
    ]
    (tmp_path / "top.png").unlink()
    found = load_folder(tmp_path)
    assert list(found.repeats) == [1, 5, 5, 2]
    images, captions, masks = found.lists()
    assert len(images) == len(captions) == len(masks) == 13
    assert images[1] is images[5] is found.images[1]
    photos = check_photos(images, captions, "a cat", masks)
    assert [photo.repeats for photo in photos] == [1, 5, 5, 2]
    assert [round(float(photo.pixels.mean()) * 255) for photo in photos] == [4, 1, 2, 3]


def test_one_folder_alone_comes_once(tmp_path: Path) -> None:
    put(tmp_path, "10_sks cat/a.png", "10_sks cat/b.png")
    (tmp_path / "10_sks cat" / "a.txt").write_text("a")
    found = load_folder(tmp_path)
    assert (list(found.repeats), found.captions) == ([1, 1], ["a", ""])
    assert found.notes[0] == (
        "Repeats: 10_sks cat 10 (2 photos); all alike, so each photo comes once."
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("0_cat", "a folder with 0 repeats"), ("000_", "a folder with 0 repeats"),
        ("cat", OTHER_FOLDER), ("5", OTHER_FOLDER), ("5cat", OTHER_FOLDER),
        ("-5_cat", OTHER_FOLDER), ("_5_cat", OTHER_FOLDER),
        ("٥_cat", OTHER_FOLDER), ("1.5_cat", OTHER_FOLDER),
    ],
)  # fmt: skip
def test_other_folders_are_left_out(name: str, reason: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", f"{name}/b.png")
    found = load_folder(tmp_path)
    assert (len(found.images), found.notes) == (1, [f"Left out: {name} ({reason})."])


def test_a_folder_in_a_folder_with_repeats_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "5_cat/a.png", "5_cat/3_more/b.png", "5_cat/c/d.png", "7_none/x/y.png")
    found = load_folder(tmp_path)
    assert len(found.images) == 1
    assert found.notes[:2] == [
        "Left out: 5_cat/3_more, 5_cat/c, 7_none/x (a folder in a folder).",
        "Left out: 7_none/ (a folder without photos).",
    ]


@pytest.mark.parametrize("number", ["1001", "2024", "99999999999999999999999999"])
def test_huge_repeats_are_refused(number: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", f"{number}_cat/b.png")
    with pytest.raises(DatasetError, match=r"asks for \d{4,20} repeats.*at most 1,000.*rename it"):
        load_folder(tmp_path)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "in/a.png", "out/b.png", "in/3_here/c.png")
    (tmp_path / "in" / "5_cat").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "6_loop").symlink_to(tmp_path / "in" / "6_loop")
    (tmp_path / "in" / "7_up").symlink_to("..")
    (tmp_path / "in" / "8_same").symlink_to("3_here")
    found = load_folder(tmp_path / "in")
    assert list(found.repeats) == [1, 3, 8]
    assert found.notes[0] == "Left out: 5_cat, 7_up (a link that leads out of the folder)."


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "5_cat/b.png")
    (tmp_path / "5_cat").chmod(0)
    with pytest.raises(DatasetError, match=r"'5_cat' cannot be read .*check its permissions"):
        load_folder(tmp_path)


@settings(deadline=None, max_examples=20)
@given(repeats=st.lists(st.integers(1, 1000), min_size=1, max_size=4, unique=True))
def test_shares_are_those_of_the_names(repeats: list[int], tmp_path_factory) -> None:
    root = put(tmp_path_factory.mktemp("shares"), *(f"{n}_x/a.png" for n in repeats))
    found = load_folder(root)
    named = sorted(repeats, key=lambda n: f"{n}_x")
    assert all(
        a * d == b * c
        for a, b in zip(found.repeats, named, strict=True)
        for c, d in zip(found.repeats, named, strict=True)
    )
    assert math.gcd(*found.repeats) == 1


# --- what is looked at ------------------------------------------------------------------------


def test_a_change_in_a_folder_with_repeats_is_seen(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "5_cat/b.png", "other/c.png")
    (tmp_path / "5_cat" / "b.txt").write_text("b")
    names = {str(path.relative_to(tmp_path)) for path in watched_files(tmp_path)}
    assert names == {"a.png", "5_cat", "other", "5_cat/b.png", "5_cat/b.txt"}
