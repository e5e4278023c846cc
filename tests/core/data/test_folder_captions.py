"""Captions of a folder: which is read, in which encodings, and what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lora2_pack.lora2_core.data.folder import FolderPhotos, load_folder
from lora2_pack.lora2_core.data.photos import DatasetError
from lora2_pack.tests.core.captioned import folder, lines

AS_UTF8 = (
    r"is not readable UTF-8 text; save it anew as UTF-8 \(in Notepad: Save as, Encoding: UTF-8\)"
)


def one(root: Path) -> str:
    (caption,) = load_folder(root).captions
    return caption


# --- beside a photo ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("photo", "text"),
    [
        ("cat.png", "cat.txt"), ("cat.png", "cat.caption"), ("cat.png", "cat.TXT"),
        ("cat.PNG", "cat.txt"), ("cat.PNG", "cat.TXT"), ("cat.JPEG", "cat.Caption"),
        ("cat.png", "cat.png.txt"), ("cat.PNG", "cat.PNG.txt"), ("cat.png", "cat.PNG.TXT"),
        ("cat.png", "cat.png.caption"), ("c.a.t.png", "c.a.t.txt"), ("Cat.png", "Cat.txt"),
    ],
)  # fmt: skip
def test_a_caption_beside_a_photo_is_found(photo: str, text: str, tmp_path: Path) -> None:
    folder(tmp_path, photo)
    (tmp_path / text).write_text(" a cat\n")
    found = load_folder(tmp_path)
    assert (found.captions, found.notes) == (["a cat"], [])


ORDER = ("a.txt", "a.png.txt", "a.caption", "a.png.caption", "metadata.jsonl", "meta_cap.json")
CONTENT = {
    "metadata.jsonl": lines({"file_name": "a.png", "text": "metadata.jsonl"}),
    "meta_cap.json": json.dumps({"a": {"caption": "meta_cap.json"}}),
}


@pytest.mark.parametrize("first", range(len(ORDER) - 1))
def test_the_first_of_several_captions_is_read_and_named(first: int, tmp_path: Path) -> None:
    folder(tmp_path, "a.png")
    for name in ORDER[first:]:
        (tmp_path / name).write_text(CONTENT.get(name, name))
    found = load_folder(tmp_path)
    assert found.captions == [ORDER[first]]
    (note,) = found.notes
    shown = [name.removeprefix("a") if name.startswith("a.") else name for name in ORDER]
    assert note == (
        f"Captions of a.png: {shown[first]} is read, not {' or '.join(shown[first + 1 :])}."
    )


@pytest.mark.skipif(os.path.normcase("A") == "a", reason="needs names whose case counts")
@pytest.mark.parametrize(
    ("photo", "texts", "said"),
    [
        ("cat.png", ("cat.txt", "CAT.TXT"), "cat.txt is read, not CAT.TXT"),
        ("cat.png", ("cat.txt", "cat.TXT"), "cat.txt is read, not cat.TXT"),
        ("cat.png", ("cat.txt", "Cat.txt"), "cat.txt is read, not Cat.txt"),
        ("cat.png", ("Cat.txt", "cat.caption"), "Cat.txt is read, not cat.caption"),
        ("cat.png", ("cat.TXT", "cat.caption"), ".TXT is read, not .caption"),
        (
            "cat.png",
            ("cat.txt", "CAT.txt", "meta.json"),
            "cat.txt is read, not CAT.txt or meta.json",
        ),
    ],
)
def test_captions_that_differ_in_capitals_are_named_in_full(
    photo: str, texts: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder(tmp_path, photo)
    for name in texts:
        (tmp_path / name).write_text(json.dumps({"cat": "x"}) if name == "meta.json" else name)
    found = load_folder(tmp_path)
    assert (found.captions, found.notes) == ([texts[0]], [f"Captions of {photo}: {said}."])


@pytest.mark.parametrize("name", ["a.txt", "a.png.caption", "metadata.jsonl", "meta.json"])
@pytest.mark.parametrize("kind", ["pipe", "nowhere", "loop"])
def test_a_caption_that_is_no_file_is_left_out_by_name(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder(tmp_path, "a.png")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)  # whoever opens it waits
    else:
        (tmp_path / name).symlink_to("gone" if kind == "nowhere" else name)
    found = load_folder(tmp_path)
    assert found.captions == [""]
    assert found.notes == [f"Left out: {name} (no file: a pipe, or a link that leads nowhere)."]


@pytest.mark.parametrize("empty", ["", " \n\t ", "\ufeff"])
def test_an_empty_caption_is_none(empty: str, tmp_path: Path) -> None:
    assert one(folder(tmp_path, "a.png", a__txt=empty)) == ""
    assert one(folder(tmp_path, a__caption="a cat")) == "a cat"


def test_what_takes_the_prompt_is_said_where_others_have_captions(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", "b.png", "c.png", b__txt="b", c__txt=" ")
    assert load_folder(tmp_path).notes == [
        "Without a caption (they take the prompt): a.png, c.png."
    ]
    (tmp_path / "b.txt").unlink()
    assert load_folder(tmp_path).notes == []


def test_a_caption_of_no_photo_is_named(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", a__txt="a", A_1__txt="x", notes__caption="y")
    assert load_folder(tmp_path).notes == ["Captions of no photo here: A_1.txt, notes.caption."]


@pytest.mark.skipif(os.path.normcase("A") == "a", reason="needs names whose case counts")
def test_the_case_of_a_name_counts_where_both_are_there(tmp_path: Path) -> None:
    folder(tmp_path, "A.png", "a.png", A__txt="large", a__txt="small")
    assert load_folder(tmp_path).captions == ["large", "small"]


# --- encodings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-16-be-mark"]
)
@pytest.mark.parametrize("kind", ["a__txt", "metadata__jsonl", "meta__json"])
def test_unicode_is_read(kind: str, coding: str, tmp_path: Path) -> None:
    caption = "Zoë’s 猫, 🐈"
    text = {
        "a__txt": caption,
        "metadata__jsonl": f'{{"file_name": "a.png", "text": "{caption}"}}\r\n',
        "meta__json": f'{{"a": {{"caption": "{caption}"}}}}',
    }[kind]
    marked = text if not coding.endswith("-mark") else "\ufeff" + text
    data = marked.encode(coding.removesuffix("-mark"))
    assert one(folder(tmp_path, "a.png", **{kind: data})) == caption


@pytest.mark.parametrize(
    ("coding", "text"),
    [
        ("cp1252", "the robot’s arm"), ("shift-jis", "ロボット"), ("latin-1", "Zoë"),
        ("gb18030", "机器人"), ("euc-kr", "로봇"), ("iso2022_jp", "ロボット"),
        ("utf-16-le", "a robot"), ("utf-16-be", "a robot"), ("utf-32", "a robot"),
        ("utf-16-le", "робот"), ("utf-16-be", "ρομπότ"), ("utf-16-le", "रोबोट"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["a__txt", "metadata__jsonl", "meta__json"])
def test_another_encoding_is_named_with_what_to_do(
    kind: str, coding: str, text: str, tmp_path: Path
) -> None:
    folder(tmp_path, "a.png", **{kind: text.encode(coding)})
    with pytest.raises(DatasetError, match=rf"^{kind.replace('__', '.')} {AS_UTF8}\.$"):
        load_folder(tmp_path)


@pytest.mark.parametrize("sign", [chr(n) for n in range(32)])
def test_signs_that_steer_a_device_are_no_text(sign: str, tmp_path: Path) -> None:
    folder(tmp_path, "a.png", a__txt=f"a{sign}cat")
    if sign in "\t\n\f\r":
        assert one(tmp_path) == f"a{sign}cat"
    else:
        with pytest.raises(DatasetError, match=rf"^a\.txt {AS_UTF8}\.$"):
            load_folder(tmp_path)


def test_half_of_utf16_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=AS_UTF8):
        load_folder(folder(tmp_path, "a.png", a__txt=b"\xff\xfe\x00\xd8"))


def test_parts_of_a_folder_are_as_many() -> None:
    with pytest.raises(DatasetError, match="differ in number"):
        FolderPhotos([], ["a"], [], [])
