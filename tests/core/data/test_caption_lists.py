"""Files that hold the captions of a folder: metadata.jsonl, kohya's JSON and other JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lora2_pack.lora2_core.data.folder import load_folder
from lora2_pack.lora2_core.data.photos import DatasetError
from lora2_pack.tests.core.captioned import folder, lines

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
        "no json", '{"file_name": "a.png"', "[1]", '"a.png"',
        '{"file_name": "a.png", "text": "a", "caption": 7}', '{"caption": "a cat"}',
        '{"text": "a cat"}', '{"file_name": 7, "text": "a"}', '{"file_name": "a.png", "text": 7}',
        '{"file_name": "a.png", "text": ["a"]}', "[" * 100_000, "1" * 9000,
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    good = {"file_name": "a.png", "text": "a"}
    folder(tmp_path, "a.png", "b.png", metadata__jsonl=lines(good, "", line))
    with pytest.raises(DatasetError, match=r"^metadata\.jsonl, line 3 is not of the form .*remove"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("entry", "caption"),
    [
        ({"caption": "A"}, "A"),
        ({"prompt": " A"}, "A"),
        ({"prompt": "C", "caption": "B", "text": "A"}, "A"),
        ({"prompt": "B", "caption": "A"}, "A"),
        ({"text": None, "caption": " ", "prompt": "A"}, "A"),
    ],
)
@pytest.mark.parametrize("name", ["metadata__jsonl", "meta__json"])
def test_a_text_may_be_called_caption_or_prompt(
    name: str, entry: dict, caption: str, tmp_path: Path
) -> None:
    entry = {"file_name": "a.png", **entry}
    text = json.dumps(entry) if "jsonl" in name else json.dumps([entry])
    found = load_folder(folder(tmp_path, "a.png", **{name: text}))
    assert (found.captions, found.notes) == ([caption], [])


def test_lines_without_a_text_are_named(tmp_path: Path) -> None:
    names = [f"{letter}.png" for letter in "abcdefg"]
    entries = [{"file_name": name, "label": 1, "text": None} for name in names]
    folder(tmp_path, *names, metadata__jsonl=lines(*entries))
    (note,) = load_folder(tmp_path).notes
    assert note == (
        "metadata.jsonl has no text in lines 1, 2, 3, 4, 5 and 2 more; give it as "
        '"text", "caption" or "prompt".'
    )
    (tmp_path / "metadata.jsonl").write_text(lines("", {"file_name": "a.png"}))
    assert load_folder(tmp_path).notes[0].startswith("metadata.jsonl has no text in line 2;")


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


@pytest.mark.parametrize("tags", [["cat", " sitting ", ""], "cat, sitting"])
def test_tags_may_be_a_list(tags: list[str] | str, tmp_path: Path) -> None:
    tree = {"a": {"tags": tags}, "b": {"caption": "b", "tags": tags}}
    found = load_folder(folder(tmp_path, "a.png", "b.png", meta__json=json.dumps(tree)))
    assert (found.captions, found.notes) == (["cat, sitting", "b, cat, sitting"], [])


# --- other JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "a.png", "./a.png", "/data/a.png"])
def test_names_may_have_their_captions_alone(key: str, tmp_path: Path) -> None:
    tree = {key: " A ", "b": {"caption": "B"}, "c": "C", "x": "X"}
    folder(tmp_path, "a.png", "b.png", "c.png", "d.png", meta__json=json.dumps(tree))
    found = load_folder(tmp_path)
    assert found.captions == ["A", "B", "C", ""]
    assert found.notes == [
        "meta.json names pictures that are not here: x.",
        "Without a caption (they take the prompt): d.png.",
    ]
    (tmp_path / "meta.json").write_text(json.dumps({key: "A", "b": 7}))
    found = load_folder(tmp_path)
    assert found.captions == ["A", "", "", ""]
    assert found.notes == ["Without a caption (they take the prompt): b.png, c.png, d.png."]


def test_a_list_in_json_is_read_as_lines(tmp_path: Path) -> None:
    entries = [{"file_name": "b.png", "text": "B"}, {"file_name": "a.png"}]
    folder(tmp_path, "a.png", "b.png", meta__json=json.dumps(entries))
    found = load_folder(tmp_path)
    assert found.captions == ["", "B"]
    assert found.notes[0].startswith("meta.json has no text in entry 2;")
    (tmp_path / "meta.json").write_text(json.dumps([*entries, {"image": "a.png", "text": "A"}]))
    with pytest.raises(DatasetError, match=r"^meta\.json, entry 3 is not of the form"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", "7", '{"nodes": [{"id": 1}]}', '{"a": {"size": 3}}', "{}", '{"a": ["A"]}', '["A"]',
     '{"caption": "A"}', '{"tags": ["cat"]}', json.dumps({"data": "x" * 100_001})],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a__json", "5_x/workflow__json"])
def test_json_without_captions_is_left_out_by_name(name: str, text: str, tmp_path: Path) -> None:
    found = load_folder(folder(tmp_path, "a.png", "5_x/b.png", **{name: text}))
    assert found.captions == ["", ""]
    assert found.notes[0] == (
        f"Left out: {name.replace('__', '.')} (JSON without captions as names and texts; those of "
        "one photo are read from a .txt)."
    )


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000])
def test_json_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    folder(tmp_path, "a.png", meta__json=text)
    with pytest.raises(DatasetError, match=r"^meta\.json is no JSON; correct it, or move it out"):
        load_folder(tmp_path)
    folder(tmp_path, a__txt="a")
    assert load_folder(tmp_path).notes == [
        "Left out: meta.json is no JSON; correct it, or move it out of the folder."
    ]
