"""What ComfyUI may lose: one sentence says so, what needs it stops, everything else works."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host import surface
from lora2_pack.lora2_core.comfy_host.copies.text_encoders import TextEncoders
from lora2_pack.lora2_core.comfy_host.loading import bypass
from lora2_pack.lora2_core.comfy_host.painting import Painter
from lora2_pack.lora2_core.comfy_host.surface import TABLE, Part, Used
from lora2_pack.lora2_core.data.cache import TensorCache
from lora2_pack.lora2_core.files.read import LoRAFile
from lora2_pack.lora2_core.training.denoising import CachedTexts
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
AGAIN = "lora2_again"  # the pack once more, imported while something is missing
CORE = "lora2_pack.lora2_core."
THINGS = [(used, what) for used in TABLE for what in ("", *used.keywords, *used.fields)]
# The nodes that cannot even be shown without something: it makes their lists.
LORAS = {"LoRA2Load", "LoRA2InspectRanks", "LoRA2Resize", "LoRA2Merge"}
HIDDEN = {
    "folder_paths.get_filename_list": LORAS,
    "folder_paths.get_input_directory": {"LoRA2ImageFolder"},
    "folder_paths.get_input_subfolders": {"LoRA2ImageFolder"},
    "folder_paths.folder_names_and_paths": LORAS,
    "folder_paths.filename_list_cache": LORAS,
}


@pytest.fixture
def again() -> Iterator[Any]:
    """Imports the pack as ComfyUI would now, and returns its package."""

    def load() -> Any:
        from lora2_tools import pack

        pack.register(AGAIN, ROOT)
        for name, module in list(sys.modules.items()):  # what knows no ComfyUI need not be new
            if name.startswith(CORE) and not name.startswith(CORE + "comfy_host"):
                sys.modules[name.replace("lora2_pack", AGAIN, 1)] = module
        return importlib.import_module(f"{AGAIN}.nodes")

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == AGAIN]:
        del sys.modules[name]


def _remove(patch: pytest.MonkeyPatch, used: Used, what: str) -> None:
    """Take a function, a class, an argument or a field away from ComfyUI, wherever it may be."""
    for place in used.places:
        owner, _, leaf = place.rpartition(".")
        holder = surface._find(owner) or importlib.import_module(owner)
        if not hasattr(holder, leaf):
            continue
        if not what:
            owners = inspect.getmro(holder) if inspect.isclass(holder) else (holder,)
            for one in (one for one in owners if leaf in vars(one)):
                patch.delattr(one, leaf)
        elif what in used.fields:
            _remove_field(patch, getattr(holder, leaf), what)
        elif inspect.isclass(thing := getattr(holder, leaf)):
            patch.setattr(thing, "__init__", lambda *_positional: None)
        else:
            patch.setattr(holder, leaf, lambda *_positional: None)


def _remove_field(patch: pytest.MonkeyPatch, kind: Any, field: str) -> None:
    for one in inspect.getmro(kind):
        if field in vars(one):
            patch.delattr(one, field)
        if field in getattr(one, "__annotations__", {}):
            patch.delitem(one.__annotations__, field)
        for name, value in list(vars(one).items()):
            code = getattr(value, "__code__", None)
            if code is not None and field in code.co_names:
                names = tuple("renamed" if word == field else word for word in code.co_names)
                code = code.replace(co_names=names)
                more = value.__defaults__, value.__closure__
                made = types.FunctionType(code, value.__globals__, name, *more)
                patch.setattr(one, name, made)


def test_nothing_is_missing_here():
    assert surface.MISSING == {}
    assert all(surface.is_there(part) for part in Part)


@pytest.mark.parametrize(
    ("used", "what"), THINGS, ids=[f"{used.name}-{what}".rstrip("-") for used, what in THINGS]
)
def test_what_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, used: Used, what: str):
    monkeypatch.setattr(logging, "warning", lambda *_: None)
    _remove(monkeypatch, used, what)
    missing = surface.lacks()
    assert set(used.parts) <= missing.keys()
    mark = {True: f"({what}=)", False: f".{what}"}[what in used.keywords] if what else ""
    monkeypatch.setattr(surface, "MISSING", missing)
    for part in used.parts:
        with pytest.raises(comfy_host.HostError) as refusal:
            surface.need(part)
        assert "\n" not in str(refusal.value)
        assert surface.version() in str(refusal.value) and part.value in str(refusal.value)
    lines = surface.report()
    # What belongs to a class that more is used of may be named by another part of it.
    assert any(used.name + mark in line or missing[used.parts[0]] in line for line in lines)
    for part in set(Part) - missing.keys():
        surface.need(part)


@pytest.mark.parametrize("used", TABLE, ids=[used.name for used in TABLE])
def test_the_pack_loads_without(monkeypatch: pytest.MonkeyPatch, again: Any, used: Used):
    _remove(monkeypatch, used, "")
    loaded = again()
    names = {node.__name__ for node in loaded.nodes()}
    every = {name for group in loaded.NODES.values() for name in group}
    assert names == every - HIDDEN.get(used.name, set())


# --- the rest works -----------------------------------------------------------------------------

Parts = tuple[Any, Any, Any]  # MODEL, CLIP and VAE
LAYER = "diffusion_model.middle_block.1.proj_in"


def _train(parts: Parts) -> None:
    setup = comfy_host.prepare_training(*parts, demo.photos(1), demo.settings(steps=1))
    run = Trainer(setup.network, setup.task, setup.config, setup.entropy).run()
    assert [event.step for event in run] == [1]


def _load(parts: Parts, way: str) -> None:
    width = parts[0].model.state_dict()[f"{LAYER}.weight"].shape[0]
    state = {
        f"{LAYER}.lora_down.weight": torch.ones(1, width),
        f"{LAYER}.lora_up.weight": torch.ones(width, 1),
    }
    file = LoRAFile(state, {})
    patched = comfy_host.apply_lora(*parts[:2], file, 1.0, 1.0, "a file", way=way).model
    weight = {f"{LAYER}.weight"}
    beside = weight if way == "bypass" else set[str]()
    assert (set(bypass.branches_of(patched)), set(patched.patches)) == (beside, weight - beside)


def _paint(parts: Parts) -> None:
    model, clip, vae = parts
    encoder = comfy_host.Encoder(model.model, clip, vae, TensorCache(None))
    encoder.text("a cat")
    painter = Painter(comfy_host.private_copy(model), vae, CachedTexts(encoder.texts, CPU))
    painter.paint(["a cat"], 0, (64, 64), 1, 1.0)


WORKS: dict[Part, Callable[[Parts], Any]] = {
    Part.TRAINING: _train,
    Part.LOADING: lambda parts: _load(parts, "merge"),
    Part.BYPASS: lambda parts: _load(parts, "bypass"),
    Part.TEXT: lambda parts: TextEncoders(parts[1]),
    Part.PAINTING: _paint,
    Part.DEMO: lambda _: demo.build(),
    Part.BACKGROUND: lambda _: comfy_host.blocked(),
    Part.LISTS: lambda _: comfy_host.new_lora_path("a name"),
}


@pytest.mark.parametrize(
    ("gone", "stopped"),
    [  # of what ComfyUI itself can do without for as long
        ("comfy.patcher_extension.PatcherInjection", {Part.BYPASS}),
        ("comfy.sdxl_clip.SDXLClipModel", {Part.TEXT, Part.DEMO}),
        ("comfy.k_diffusion.sampling.sample_dpmpp_2m", {Part.PAINTING}),
        ("comfy.lora.load_lora", {Part.TRAINING, Part.LOADING, Part.BYPASS}),
        ("comfy_execution.graph_utils.ExecutionBlocker", {Part.BACKGROUND}),
        ("folder_paths.get_save_image_path", {Part.TRAINING, Part.LISTS}),
    ],
)
def test_the_rest_works(
    monkeypatch: pytest.MonkeyPatch, parts: Parts, gone: str, stopped: set[Part]
):
    _remove(monkeypatch, next(used for used in TABLE if used.name == gone), "")
    monkeypatch.setattr(surface, "MISSING", surface.lacks())
    refused = set[Part]()
    for part, work in WORKS.items():
        try:
            work(parts)
        except comfy_host.HostError as refusal:
            assert gone in str(refusal)
            refused.add(part)
        except (
            AttributeError
        ) as error:  # ComfyUI misses it itself, or a list of a node is not there
            assert gone.rpartition(".")[2] in str(error)
            refused.add(part)
    assert refused == stopped


def test_without_bypass_auto_merges(monkeypatch: pytest.MonkeyPatch, parts: Parts):
    monkeypatch.setattr(surface, "MISSING", {Part.BYPASS: "a thing"})
    monkeypatch.setattr(bypass, "is_coarse", lambda _: True)
    _load(parts, "auto")


def test_a_module_that_is_gone_stops_what_needs_it(monkeypatch: pytest.MonkeyPatch, again: Any):
    monkeypatch.setitem(sys.modules, "comfy.lora_convert", None)
    names = {node.__name__ for node in again().nodes()}
    assert "LoRA2Load" in names and "LoRA2Train" in names
    host = importlib.import_module(f"{AGAIN}.lora2_core.comfy_host")
    with pytest.raises(host.HostError, match=r"comfy\.lora_convert"):
        host.apply_lora(None, None, None, 1.0, 1.0, "a file")
    assert host.private_copy is not None


@pytest.mark.parametrize(("version", "said"), [("0.99.0", True), ("0.3.75", False), ("0.2", True)])
def test_an_untested_version_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, said: bool
):
    monkeypatch.setattr("comfyui_version.__version__", version)
    lines = surface.report()
    assert bool(lines) is said and len(caplog.records) == len(lines)
    assert all(version in line and "0.33.0" in line for line in lines)


def test_an_unknown_newer_version_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: Any, parts: Parts
):
    monkeypatch.setattr("comfyui_version.__version__", "1.7.0")
    for name in ("PatcherInjection", "ExecutionBlocker"):
        _remove(monkeypatch, next(used for used in TABLE if used.name.endswith(name)), "")
    loaded = again()
    assert len(loaded.nodes()) == sum(map(len, loaded.NODES.values()))
    lines = importlib.import_module(f"{AGAIN}.lora2_core.comfy_host").report()
    assert len(lines) == 3 and "1.7.0" in lines[0], lines
    monkeypatch.setattr(surface, "MISSING", surface.lacks())
    _train(parts)


# --- the table is whole --------------------------------------------------------------------------

SOURCES = [*(ROOT / "lora2_core" / "comfy_host").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
MODULES = ("comfy.", "folder_paths", "comfy_execution.", "server.")


def _uses(tree: ast.Module) -> Iterator[str]:
    """What a file asks ComfyUI's modules for, by its dotted name, without what types alone want."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts, inner = [inner.attr, *parts], inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *parts])


def test_every_use_is_in_the_table():
    known = [place for used in TABLE for place in used.places]
    modules = {place.rpartition(".")[0] for place in known}
    unknown = set[str]()
    for path in SOURCES:
        for use in _uses(ast.parse(path.read_text())):
            mine = use.startswith(MODULES) and not any(
                m == use or m.startswith(use + ".") for m in modules
            )
            covered = any(
                use == k or use.startswith(k + ".") or k.startswith(use + ".") for k in known
            )
            if mine and not covered:
                unknown.add(use)
    assert unknown == set()


def test_what_the_seam_offers_is_told_alike_to_pyright_and_to_python():
    """Its names stand there twice: for types, and by the module that is imported for them."""
    source = ast.parse(Path(comfy_host.__file__).read_text("utf-8"))
    [typed] = [node for node in source.body if isinstance(node, ast.If)]
    told = {
        alias.name: line.module
        for line in typed.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert told == comfy_host._HOME
    for name in told:
        assert getattr(comfy_host, name).__name__ == name
