"""Captions beside photos and in files of a whole folder: which is read, and what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lora2_pack.lora2_core.data.folder import FolderPhotos, load_folder
from lora2_pack.lora2_core.data.photos import DatasetError
from PIL import Image

AS_UTF8 = (
    r"is not readable UTF-8 text; save it anew as UTF-8 \(in Notepad: Save as, Encoding: UTF-8\)"
)


def folder(root: Path, *photos: str, **texts: str | bytes) -> Path:
    """Photos of 8 px, and files whose names have a dash for each dot."""
    for name in photos:
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "PNG")
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode()
        (root / name.replace("__", ".")).write_bytes(data)
    return root


def lines(*entries: dict | str) -> str:
    return "\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries)


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
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["a__txt", "metadata__jsonl", "meta__json"])
def test_another_encoding_is_named_with_what_to_do(
    kind: str, coding: str, text: str, tmp_path: Path
) -> None:
    folder(tmp_path, "a.png", **{kind: text.encode(coding)})
    with pytest.raises(DatasetError, match=rf"^{kind.replace('__', '.')} {AS_UTF8}\.$"):
        load_folder(tmp_path)


def test_half_of_utf16_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=AS_UTF8):
        load_folder(folder(tmp_path, "a.png", a__txt=b"\xff\xfe\x00\xd8"))


# --- metadata.jsonl ---------------------------------------------------------------------------


def test_lines_of_a_list_find_their_photos(tmp_path: Path) -> None:
    text = lines(
        {"file_name": "b.png", "text": " two "},
        "",
        {"file_name": "./a.png", "text": "one", "more": [1]},
        {"file_name": "c.png", "text": None},
        {"file_name": "5_x/d.png", "text": "three\u2028lines"},
    )
    folder(tmp_path, "a.png", "b.png", "c.png", "5_x/d.png", metadata__jsonl=text)
    assert load_folder(tmp_path).captions == ["one", "two", "", "three\u2028lines"]


def test_a_list_in_a_folder_with_repeats_comes_before_that_around_it(tmp_path: Path) -> None:
    folder(tmp_path, "5_x/a.png", "5_x/b.png")
    outer = [{"file_name": f"5_x/{n}.png", "text": f"outer {n}"} for n in "ab"]
    (tmp_path / "metadata.jsonl").write_text(lines(*outer))
    (tmp_path / "5_x" / "metadata.jsonl").write_text(lines({"file_name": "a.png", "text": "inner"}))
    assert load_folder(tmp_path).captions == ["inner", "outer b"]


@pytest.mark.parametrize(
    "line",
    [
        "no json", '{"file_name": "a.png"', "[1]", '"a.png"', '{"file_name": "a.png"}',
        '{"text": "a cat"}', '{"file_name": 7, "text": "a"}', '{"file_name": "a.png", "text": 7}',
        '{"file_name": "a.png", "text": ["a"]}', "[" * 100_000, "1" * 9000,
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    good = {"file_name": "a.png", "text": "a"}
    folder(tmp_path, "a.png", "b.png", metadata__jsonl=lines(good, "", line))
    with pytest.raises(DatasetError, match=r"^metadata\.jsonl, line 3 is not of the form .*remove"):
        load_folder(tmp_path)


def test_a_bad_list_that_nobody_needs_is_left_out(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", a__txt="a", metadata__jsonl="{")
    found = load_folder(tmp_path)
    assert found.captions == ["a"]
    assert [note.split(" is not")[0] for note in found.notes] == [
        "Left out: metadata.jsonl, line 1"
    ]


@pytest.mark.parametrize(
    "name", ["../out.png", "/etc/out.png", "C:\\\\out.png", "sub/out.png", "x.png"]
)
def test_a_name_that_leads_elsewhere_is_never_opened(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    os.mkfifo(tmp_path / "out.png")  # whoever opens it waits
    entries = [{"file_name": "a.png", "text": "a"}, {"file_name": name, "text": "out"}]
    found = load_folder(folder(inside, "a.png", metadata__jsonl=lines(*entries)))
    assert found.captions == ["a"]
    (note,) = found.notes
    assert note == f"metadata.jsonl names pictures that are not here: {name}."


def test_two_captions_of_one_photo_in_a_list_are_refused(tmp_path: Path) -> None:
    entries = [{"file_name": "a.png", "text": text} for text in ("a", "a ", "b")]
    folder(tmp_path, "a.png", metadata__jsonl=lines(*entries))
    with pytest.raises(
        DatasetError, match=r"^metadata\.jsonl, line 3 gives a\.png another caption"
    ):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.csv"])
def test_a_list_by_another_name_is_left_out(name: str, tmp_path: Path) -> None:
    folder(tmp_path, "a.png")
    (tmp_path / name).write_text("file_name,text")
    (note,) = load_folder(tmp_path).notes
    assert note == f"Left out: {name} (captions of a folder are read from metadata.jsonl)."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a__txt", "x" * 100_001),
        ("metadata__jsonl", lines({"file_name": "a.png", "text": "x" * 100_001})),
        ("metadata__jsonl", " " * 20_000_001),
        ("meta__json", " " * 20_000_001),
        ("meta__json", json.dumps({"a": {"caption": "é" * 50_001}})),
    ],
)
def test_what_no_caption_has_is_refused(name: str, text: str, tmp_path: Path) -> None:
    folder(tmp_path, "a.png", **{name: text})
    with pytest.raises(
        DatasetError, match=r"^\S+ ha(s|lds).* more than [\d,]+ bytes|holds a caption"
    ):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["metadata__jsonl", "meta__json"])
def test_half_a_sign_in_json_is_no_text(name: str, tmp_path: Path) -> None:
    text = (
        r'{"file_name": "a.png", "text": "\ud800"}'
        if "jsonl" in name
        else r'{"a": {"caption": "\ud800"}}'
    )
    folder(tmp_path, "a.png", **{name: text})
    with pytest.raises(DatasetError, match="holds a caption with signs that are no text"):
        load_folder(tmp_path)


# --- kohya's JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "caption"),
    [
        ({"caption": "a cat"}, "a cat"),
        ({"tags": "cat, sitting"}, "cat, sitting"),
        ({"caption": " a cat", "tags": "cat "}, "a cat, cat"),
        ({"caption": "a cat", "tags": ""}, "a cat"),
        ({"caption": "", "tags": "cat"}, "cat"),
        ({"caption": None, "tags": "cat", "train_resolution": [512, 512]}, "cat"),
    ],
)
@pytest.mark.parametrize("key", ["a.b", "a.b.png", "/data/train/a.b.png", "D:\\train\\a.b.png"])
def test_entries_of_kohya_find_their_photos(key: str, entry: dict, caption: str, tmp_path: Path):
    tree = {key: entry, "other": {"caption": "x"}}
    folder(tmp_path, "a.b.png", meta__json=json.dumps(tree))
    found = load_folder(tmp_path)
    assert found.captions == [caption]
    assert found.notes == ["meta.json names pictures that are not here: other."]


def test_the_folder_of_an_entry_counts(tmp_path: Path) -> None:
    tree = {"/train/5_x/a.png": {"caption": "inner"}, "/train/a.png": {"caption": "outer"}}
    folder(tmp_path, "a.png", "5_x/a.png", meta__json=json.dumps(tree))
    assert load_folder(tmp_path).captions == ["outer", "inner"]


def test_a_file_of_kohya_that_is_of_other_photos_is_named(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", meta__json=json.dumps({"x": {"caption": "a"}}))
    found = load_folder(tmp_path)
    assert found.captions == [""]
    assert found.notes == ["meta.json names pictures that are not here: x."]


def test_two_entries_for_one_photo_are_refused(tmp_path: Path) -> None:
    tree = {"a": {"caption": "one"}, "/x/a.png": {"caption": "two"}}
    folder(tmp_path, "a.png", meta__json=json.dumps(tree))
    with pytest.raises(DatasetError, match=r"^meta\.json gives a\.png two captions"):
        load_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", '{"nodes": [{"id": 1}]}', '{"a": {"size": 3}}', "{}"])
def test_json_of_another_kind_is_passed_over(text: str, tmp_path: Path) -> None:
    found = load_folder(folder(tmp_path, "a.png", "b.png", workflow__json=text))
    assert (found.captions, found.notes) == (["", ""], [])


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000])
def test_json_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    folder(tmp_path, "a.png", meta__json=text)
    with pytest.raises(DatasetError, match=r"^meta\.json is no JSON; correct it, or move it out"):
        load_folder(tmp_path)
    folder(tmp_path, a__txt="a")
    assert load_folder(tmp_path).notes == [
        "Left out: meta.json is no JSON; correct it, or move it out of the folder."
    ]


def test_parts_of_a_folder_are_as_many() -> None:
    with pytest.raises(DatasetError, match="differ in number"):
        FolderPhotos([], ["a"], [], [])
