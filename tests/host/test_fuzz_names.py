"""Names that people and workflows give, at random: a path within the folders, or a sentence."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import folder_paths
import pytest
from lora2_pack.lora2_core import comfy_host
from lora2_pack.tests.core.tries import TRIES, in_time
from nodes import LoraLoader

PARTS = (
    "cat", "my cats", "Ünïcødé ²", "猫", "💣", "a" * 300, "é" * 150, ".", "..", "...", " ", "", "~",
    "C:", "CON", "nul.txt", "com1", "LPT9 ", "a.b", ".hidden", "x.safetensors", "%year%", "%date%",
    "%width%_%height%", "\\", "\\\\host\\share", "//", "\n", "\t", "\x00", "\x1b[31m", "\u202e",
    "\u2066", "\ud800", "\u200b", "<", ">", ":", '"', "|", "?", "*", "-rf", "$(id)", "{}",
    "x" * 5000,
    "link", "file", "/etc", "/proc/self",
)  # fmt: skip


def _name(chance: random.Random) -> str:
    parts = [chance.choice(PARTS) for _ in range(chance.choice((1, 1, 2, 3, 60)))]
    return chance.choice(("/", "", "\\", "/")).join(parts)


@pytest.fixture
def folders(comfy_directory: Path, tmp_path: Path):
    """A link out of each folder, and a file where a folder might be."""
    loras, inputs = comfy_directory / "output" / "loras", comfy_directory / "input"
    made: list[Path] = []
    for folder in (loras, inputs):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "link").symlink_to(tmp_path, target_is_directory=True)
        (folder / "file").write_text("in the way")
        made += [folder / "link", folder / "file"]
    before = set(loras.iterdir())
    yield loras.resolve(), inputs.resolve()
    for path in {*loras.iterdir()} - before:
        shutil.rmtree(path)
    for path in made:
        path.unlink()


def _new_lora(name: str, loras: Path) -> None:
    path = comfy_host.new_lora_path(name)
    assert path.is_relative_to(loras) and not path.exists() and path.name.isprintable()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a name that the disk takes
    path.unlink()


def _dataset(name: str, inputs: Path) -> None:
    path = comfy_host.dataset_folder(name)
    assert path.is_dir() and (path == inputs or inputs in path.parents)


def _lora(name: str, loras: Path) -> None:
    assert comfy_host.lora_path(name).parent.resolve().is_relative_to(loras)


def test_a_folder_that_was_deleted_is_listed_no_more(comfy_directory: Path) -> None:
    folder = comfy_directory / "output" / "loras" / "deleted"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").touch()
    assert any("deleted" in name for name in comfy_host.lora_names())
    shutil.rmtree(folder)
    assert not any("deleted" in name for name in comfy_host.lora_names())


def test_the_list_is_the_stock_loader_s(comfy_directory: Path) -> None:
    """But for what is pickled, whatever the letters of its ending."""
    folder = comfy_directory / "output" / "loras" / "endings"
    safe = ("a.safetensors", "b.SAFETENSORS", "c.sft", "d.SFT", "e.SafeTensors")
    others = ("f.pt", "g.CKPT", "h.bin", "i.safetensors.txt", ".safetensors", "sft")
    folder.mkdir(parents=True)
    try:
        for name in (*safe, *others):
            (folder / name).touch()
        listed = [n for n in folder_paths.get_filename_list("loras") if "endings" in n]
        pickled = [n for n in listed if n.lower().endswith((".pt", ".ckpt", ".bin"))]
        ours = [name for name in comfy_host.lora_names() if "endings" in name]
        assert ours == [name for name in listed if name not in pickled]
        assert {Path(name).name for name in ours} == {*safe} and len(pickled) == 3
        for name in ours:
            assert comfy_host.lora_path(name).name == Path(name).name
        for name in pickled:
            with pytest.raises(comfy_host.HostError, match="is not a safetensors file"):
                comfy_host.lora_path(name)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("typed", ["x/cat", "x/cat.safetensors", "x/cat.SFT", "x\\cat.Safetensors"])
def test_an_ending_that_is_typed_is_not_part_of_the_name(typed: str) -> None:
    path = comfy_host.new_lora_path(typed)
    assert (path.parent.name, path.name) == ("x", "cat_00001_.safetensors")


@pytest.mark.parametrize(
    "name", ["CON", "a/nul.txt", "x/COM¹", "lpt³.txt", "CONIN$", "clock$/x", "cats./x", "cats /x"]
)
def test_names_that_windows_takes_for_something_else(name: str) -> None:
    with pytest.raises(comfy_host.HostError, match="file_name is "):
        comfy_host.new_lora_path(name)


@pytest.mark.parametrize("use", [_new_lora, _dataset, _lora])
def test_names_at_random(folders, use: Callable[[str, Path], None]) -> None:
    loras, inputs = folders
    chance, ends = random.Random(3), Counter[bool]()
    for _ in range(TRIES):
        name = _name(chance)
        with in_time(name):
            try:
                use(name, inputs if use is _dataset else loras)
            except comfy_host.HostError as error:
                said = str(error)
                assert said.isprintable() and len(said) < 700, repr(said)
                ends[False] += 1
            else:
                ends[True] += 1
    assert ends[False] > TRIES // 10
    if use is _new_lora:
        assert ends[True] > TRIES // 20


def test_every_loras_folder_is_listed_and_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ComfyUI's own loader: people keep LoRAs on several disks."""
    places = [tmp_path / "one", tmp_path / "two"]
    for number, place in enumerate(places):
        (place / "sub").mkdir(parents=True)
        (place / "same.safetensors").write_bytes(bytes([number]))
        (place / "sub" / f"only {number}.safetensors").write_bytes(b"")
    found = ([str(place) for place in places], folder_paths.folder_names_and_paths["loras"][1])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", found)
    folder_paths.filename_list_cache.pop("loras", None)
    names = {"same.safetensors", *(f"sub{os.sep}only {n}.safetensors" for n in (0, 1))}
    stock = LoraLoader.INPUT_TYPES()["required"]["lora_name"][0]
    assert set(comfy_host.lora_names()) == names == set(stock)
    assert comfy_host.lora_path("same.safetensors").read_bytes() == b"\0"
    assert comfy_host.lora_path("sub/only 1.safetensors").is_relative_to(places[1])
    folder_paths.filename_list_cache.pop("loras", None)
