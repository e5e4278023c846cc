"""Files that others cut or write over while they are read, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files import header
from lora2_pack.lora2_core.files.header import LoRAFileError, read_header
from lora2_pack.lora2_core.files.raw.tensors import TensorFile
from lora2_pack.lora2_core.resizing import resize
from lora2_pack.lora2_core.resizing.frame import Frame
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.lora2_core.resizing.source import LoRASource
from lora2_pack.tests.conftest import ROOT
from lora2_pack.tests.core import spoiling

LAYERS = [(f"input_blocks.{n}.1.attn1.to_q", 4000, 3000) for n in range(12)]  # 0.7 MB
SOUND = spoiling.sound_of_two_factors(LAYERS, "kohya")


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4000)


def written_over(path: Path) -> None:
    """In place, as many bytes as before."""
    with path.open("r+b") as file:
        file.seek(4000)
        file.write(b"\x7f" * (len(SOUND) - 4000))


def dated_back(path: Path) -> None:
    """As those do that copy a file with its times."""
    before = path.stat()
    time.sleep(0.02)
    written_over(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(SOUND[:-1])
    other.replace(path)


CHANGES = (cut, written_over, dated_back, replaced)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SOUND)
    # The clock of a file ticks a few hundred times a second.
    os.utime(path, (path.stat().st_mtime - 60,) * 2)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_since_its_header_was_read(path: Path, change) -> None:
    found = read_header(path)
    change(path)
    with pytest.raises(LoRAFileError, match="was changed while it was read; wait until"):
        TensorFile(found).__enter__()


@pytest.mark.parametrize("change", [cut, written_over, dated_back])
def test_what_was_changed_between_two_tensors(path: Path, change) -> None:
    keys = list(read_header(path).entries)
    with TensorFile(read_header(path)) as file:
        file.tensor(keys[0])
        change(path)
        with pytest.raises(LoRAFileError, match="was changed while it was read"):
            file.tensor(keys[1])


@pytest.mark.parametrize("change", [cut, written_over, dated_back])
@pytest.mark.parametrize("way", ["resize", "merge", "copy"])
def test_nothing_is_written_of_a_file_that_changes(path: Path, monkeypatch, way: str, change):
    """It changes after the ranks were chosen, between the two passes."""
    other, target = path.with_name("other.safetensors"), path.with_name("new.safetensors")
    other.write_bytes(SOUND)
    if way == "copy":
        resize_file(other, path, Limits())  # of our format: it will be copied as it is
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    choose = Frame.choose

    def choose_and_change(*given) -> list[int]:
        found = choose(*given)
        change(path)
        return found

    monkeypatch.setattr(Frame, "choose", choose_and_change)
    with pytest.raises(LoRAFileError, match="was changed while it was read"):
        if way == "merge":
            merge_files([(path, 1.0), (other, 0.5)], target, Limits())
        else:
            resize_file(path, target, Limits(max_rank=1 if way == "resize" else None))
    assert {one.name for one in path.parent.iterdir()} == {path.name, other.name}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_loaded_stays(path: Path, change) -> None:
    before = {key: tensor.clone() for key, tensor in lora_file.load(path).state.items()}
    file = lora_file.load(path)
    change(path)
    assert all(torch.equal(file.state[key], tensor) for key, tensor in before.items())


def test_a_copy_is_of_what_was_read(path: Path, tmp_path: Path) -> None:
    """Somebody else's file may bear its name by then."""
    with LoRASource(path) as source:
        replaced(path)
        with pytest.raises(LoRAFileError, match="was changed while it was read"):
            resize._copy(source, tmp_path / "copy.safetensors", True)
    assert not [p for p in tmp_path.iterdir() if "copy" in p.name]


USE = """
import runpy, sys, threading, time
from importlib import import_module
from pathlib import Path

runpy.run_path(sys.argv[1])["register"]()
path, sound = Path(sys.argv[2]), Path(sys.argv[2]).read_bytes()
if sys.argv[3] == "ours":
    core = "lora2_pack.lora2_core."
    load = import_module(core + "lora_file").load
    errors = import_module(core + "files.header").LoRAFileError
    read = lambda: load(path).state
else:  # as ComfyUI reads one
    import safetensors
    errors = Exception
    def read():
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
told = used = 0
def spoil(stop):
    while not stop.is_set():
        with path.open("r+b") as file:
            file.truncate(len(sound) // 3)
        path.write_bytes(sound)
        time.sleep(0.002)
stop = threading.Event()
thread = threading.Thread(target=spoil, args=(stop,), daemon=True)
thread.start()
for _ in range(150):
    try:
        state = read()
        total = sum(float(tensor.sum()) for tensor in state.values())
        assert total == total
        used += 1
    except errors:
        told += 1
stop.set()
thread.join()
print("used", used, "told", told)
"""


def _in_a_process(path: Path, whose: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(ROOT / "tools" / "pack.py"), str(path), whose]
    return subprocess.run(
        [sys.executable, "-c", USE, *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_file_that_is_cut_again_and_again_kills_nothing(path: Path) -> None:
    ours = _in_a_process(path, "ours")
    assert ours.returncode == 0, ours.stderr
    words = ours.stdout.split()
    assert int(words[1]) + int(words[3]) == 150


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_what_the_library_does_then(path: Path) -> None:
    """It maps the file, and the process ends by SIGBUS: why we do not use it."""
    assert _in_a_process(path, "the library's").returncode in (0, -7)


def test_any_kind_of_path_is_taken(path: Path) -> None:
    assert lora_file.inspect(str(path))[0] == lora_file.inspect(path)[0]
    assert lora_file.load(str(path)).state.keys() == lora_file.load(path).state.keys()
    with pytest.raises(LoRAFileError, match="nothing does not exist"):
        header.read_header("nothing")
