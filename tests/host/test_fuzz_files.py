"""Files from strangers: a sentence each time, never a crash, a hang, or half a patch."""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import read_header
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.tests.core import spoiling, toy
from lora2_pack.tests.core.tries import TRIES, in_memory
from lora2_pack.tests.host import test_table_of_writers as table
from lora2_pack.tests.host.patched import weights_of

MOST_SECONDS, MOST_MEGABYTES = 2.0, 200.0


def _use(path: Path, model: Any, clip: Any = None, cut: bool = True, merge: bool = True) -> str:
    """Everything that people do with a file; the sentence of a refusal, or nothing."""
    cache, sentences = LoRACache(), []
    try:
        inspector.inspect(path).text()
    except LoRAFileError as error:
        sentences.append(str(error))
    try:
        opened = cache.open(path, Limits())
        applied = comfy_host.apply_lora(model, clip, opened, 1.0, 1.0, path.name)
        if merge:  # as the sampler does: what was taken must not fail there
            found = weights_of(applied.model)
            found |= {} if clip is None else weights_of(applied.clip.patcher)
            assert all(weight.isfinite().all() for weight in found.values())
        if cut:
            cache.open(path, Limits(max_rank=1))
    except (LoRAFileError, comfy_host.HostError) as error:
        sentences.append(str(error))
    for sentence in sentences:
        assert sentence.isprintable() and sentence.startswith((str(path), path.name)), sentence
        assert len(sentence) < 1000
    return sentences[-1] if sentences else ""


def _layers(model: Any, among: str = "") -> list[spoiling.Layer]:
    found = find_targets(model.model.diffusion_model)
    return [(t.name, t.out_features, t.in_features) for t in found if among in t.name]


def _dotted(model: Any) -> list[spoiling.Layer]:
    found = _layers(model)[::16]
    return [(f"diffusion_model.{name}", out, inside) for name, out, inside in found]


MAKES: dict[str, Callable[[Any], bytes]] = {
    "LoRA²": lambda model: spoiling.sound(_layers(model)[::8]),
    "other kinds": lambda model: spoiling.sound_of_other_kinds(_layers(model, "attn1")),
    "PEFT": lambda model: spoiling.sound_of_two_factors(_dotted(model), "PEFT's magnitudes"),
    "another size": lambda model: spoiling.sound_of_two_factors(_dotted(model), "another size"),
}


# What only shows once a weight is calculated.
CALCULATED = ("numbers", "wide", "empty", "dimensions", "beside")


WAYS = [name for name in vars(spoiling.Mutations) if not name.startswith("_")]
COUNTS = dict.fromkeys(MAKES, TRIES // 8) | {"every writer's": TRIES // 2}


def _sound(kind: str, parts: Any) -> dict[str, tuple[bytes, bool]]:
    """Files of a kind, and whether a model takes them; of every writer's one for each row of the
    table in docs/format.md, and more."""
    if kind in MAKES:
        return {kind: (MAKES[kind](parts[0]), True)}
    return {
        f"{row} {number}": (safetensors.torch.save(state, told), table.TABLE[row][1] == "works")
        for row, makers in table.FILES.items()
        for number, (state, _, told) in enumerate(make(parts) for make in makers)
    }


@pytest.mark.parametrize("kind", COUNTS)
def test_two_thousand_spoilt_files(parts: Any, model: Any, tmp_path: Path, caplog: Any, kind: str):
    """A half of them of all that others write, an eighth of a plain LoRA, …"""
    sound, clip = _sound(kind, parts), parts[1]
    path = tmp_path / "x.safetensors"
    for one, (data, is_taken) in sound.items():
        path.write_bytes(data)
        assert bool(_use(path, model, clip)) != is_taken, one
    caplog.clear()  # of what is said of files that are taken
    chance = random.Random(7)
    made = [spoiling.Mutations(data, chance) for data, _ in sound.values()]
    told: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    patches, uuid = dict(model.patches), model.patches_uuid
    with in_memory(MOST_MEGABYTES), caplog.at_level(logging.ERROR):
        for number in range(COUNTS[kind]):
            way, which = WAYS[number % len(WAYS)], number // len(WAYS) % len(made)
            one = [*sound][which]
            path.write_bytes(getattr(made[which], way)())
            started = time.process_time()
            merge = number % 3 == 0 or way in CALCULATED
            try:
                sentence = _use(path, model, clip, cut=number % 5 == 0, merge=merge)
            except Exception as error:
                error.add_note(f"{one}, {way}, try {number}")
                raise
            assert time.process_time() - started < MOST_SECONDS, way
            if "LoKr" in one and way == "weights" and not sentence:
                continue  # whose alpha scales nothing where both matrices are whole
            (told if sentence else taken)[way] += 1
            assert model.patches == patches and model.patches_uuid == uuid
            # ComfyUI writes an error, and samples on, where it cannot make sense of a patch.
            assert not caplog.records, (way, caplog.text)
    assert set(told) == set(WAYS), f"never refused: {set(WAYS) - set(told)}"
    for way in ("cut", "longer", "overlap", "weights", "text"):
        assert not taken[way], f"{way} was taken {taken[way]} times"
    assert sum(taken.values()) > COUNTS[kind] // 20, "some are still sound"


def test_a_hundred_megabytes_of_metadata(model: Any, tmp_path: Path):
    header, body = spoiling.header_and_body(MAKES["LoRA²"](model))
    header["__metadata__"] = {"ss_tag_frequency": "x" * 100_000_000}
    path = tmp_path / "x.safetensors"
    path.write_bytes(toy.raw_file(header, body))
    del header, body
    with in_memory(MOST_MEGABYTES):
        refused = _use(path, model)
    assert "its header would take 100 MB, and 10 MB is the most" in refused


@pytest.mark.parametrize(
    "part", ["[],", "{},", '"ab",', "1,", "1.5,", '"\\"",', '{"a":1},', "null,"]
)
def test_headers_that_would_swell_in_memory(tmp_path: Path, part: str):
    """Ten million bytes of lists would take a quarter of a billion once they are read."""
    path = tmp_path / "x.safetensors"
    count = 9_999_900 // len(part)
    path.write_bytes(toy.raw_file(f'{{"a":[{part * count}0]}}'.encode(), b""))
    started = time.process_time()
    with in_memory(MOST_MEGABYTES), pytest.raises(LoRAFileError, match="is not a safetensors file"):
        read_header(path)
    assert time.process_time() - started < MOST_SECONDS


@pytest.mark.parametrize("end", ["", ".lora_down.weight", ".diff"])
def test_more_tensors_than_any_lora_has(model: Any, tmp_path: Path, end: str):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(toy.raw_file({f"{n}{end}": entry for n in range(20_000)}, b""))
    started = time.process_time()
    with in_memory(MOST_MEGABYTES):
        assert _use(path, model, cut=False)
    assert time.process_time() - started < 2 * MOST_SECONDS
    path.write_bytes(toy.raw_file({f"{n}": entry for n in range(40_000)}, b""))
    with in_memory(MOST_MEGABYTES):
        assert "has more parts than any LoRA's" in _use(path, model)


@contextmanager
def _linked(loras: Path, **targets: Path) -> Iterator[None]:
    loras.mkdir(parents=True, exist_ok=True)
    links = {loras / f"{name}.safetensors": target for name, target in targets.items()}
    try:
        for link, target in links.items():
            link.symlink_to(target)
        yield
    finally:
        for link in links:
            link.unlink(missing_ok=True)


def test_links_out_of_the_folder(model: Any, comfy_directory: Path, tmp_path: Path):
    """They are followed, as ComfyUI does for models on another disk, to a file that may be one."""
    secret, other, disk = tmp_path / "secret.txt", tmp_path / "other.ckpt", tmp_path / "disk"
    for path in (secret, other):
        path.write_text("root:x:0:0")
    disk.mkdir()
    sound, cached, words = disk / "sound.safetensors", disk / ("0a1b" * 16), disk / "passwd"
    for path in (sound, cached):
        path.write_bytes(MAKES["LoRA²"](model))
    words.write_text("root:x:0:0")
    pipe = disk / "pipe.safetensors"
    os.mkfifo(pipe)
    loras = comfy_directory / "output" / "loras"
    with _linked(
        loras, secret=secret, other=other, sound=sound, cached=cached, words=words, pipe=pipe,
        gone=tmp_path / "gone.safetensors", loop=loras / "loop.safetensors",
    ):  # fmt: skip
        for name in ("sound", "cached"):
            assert _use(comfy_host.lora_path(f"{name}.safetensors"), model) == ""
        for name in ("secret", "other"):
            with pytest.raises(comfy_host.HostError, match="link to another kind of file"):
                comfy_host.lora_path(f"{name}.safetensors")
        for name in ("gone", "pipe", "loop"):
            with pytest.raises(comfy_host.HostError, match="is not in a loras folder"):
                comfy_host.lora_path(f"{name}.safetensors")
        refused = _use(comfy_host.lora_path("words.safetensors"), model)
        assert "is not a safetensors file" in refused and "root" not in refused


def test_a_linked_folder(model: Any, comfy_directory: Path, tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(MAKES["LoRA²"](model))
    folder = comfy_directory / "output" / "loras" / "disk"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(tmp_path, target_is_directory=True)
    try:
        assert _use(comfy_host.lora_path("disk/x.safetensors"), model) == ""
    finally:
        folder.unlink()


def test_names_that_leave_the_folders(comfy_directory: Path):
    loras = comfy_directory / "output" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    there = loras / "there.safetensors"
    there.write_bytes(b"")
    try:
        assert comfy_host.lora_path("there.safetensors") == there
        assert comfy_host.lora_path("./there.safetensors").samefile(there)
        for name in (
            str(there), "../there.safetensors", "x/../there.safetensors", "..\\there.safetensors",
            "C:\\there.safetensors", "C:there.safetensors", "\\\\host\\there.safetensors",
            "//host/share/there.safetensors", "..",
        ):  # fmt: skip
            with pytest.raises(comfy_host.HostError, match="leads out of the loras folders"):
                comfy_host.lora_path(name)
        for name in ("", "missing.safetensors", "a\0b.safetensors", "x" * 5000, "a\nb", "\ud800"):
            with pytest.raises(comfy_host.HostError, match="not in a loras folder") as caught:
                comfy_host.lora_path(name)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    finally:
        there.unlink()


def test_what_is_no_file(tmp_path: Path):
    fifo, folder, loop = (tmp_path / f"{name}.safetensors" for name in ("fifo", "folder", "loop"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    missing = tmp_path / "missing.safetensors"
    for path in (fifo, folder, loop, missing, Path("/dev/zero"), Path("a\0b"), Path("\ud800")):
        started = time.monotonic()
        with pytest.raises(LoRAFileError, match="does not exist") as caught:
            read_header(path)
        assert time.monotonic() - started < 1 and str(caught.value).isprintable()
