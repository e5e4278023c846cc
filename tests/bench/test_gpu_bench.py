"""bench/gpu.py, all of it, without a card: what is for a card alone meets stand-ins."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.bench import runtime as entering
from lora2_pack.bench.gpu_cells import command, contestants, plan, record, running, table
from lora2_pack.bench.gpu_cells.contestants import Contestant
from lora2_pack.bench.gpu_cells.rows import Row
from lora2_pack.bench.gpu_cells.running import Rounds
from lora2_pack.lora2_core.adapters.swapping import stays_in_ram
from lora2_pack.lora2_core.config.presets import PRESETS
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.bench.measuring import group, measure, stepping

ROOT = Path(__file__).resolve().parents[2]
NUMBER = (int, float)
KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "size_px": (int,), "batch": (int,), "precision": (str,),
    "checkpointing": (bool,), "contestant": (str,), "preset": (str,), "status": (str,),
    "note": (str,), "step_ms": NUMBER, "steps_timed": (int,), "in_turns": (bool,),
    "of_floor": NUMBER, "peak_allocated_mb": NUMBER, "peak_reserved_mb": NUMBER,
    "told_mb": NUMBER, "scaled_mb": NUMBER, "told_of_taken": NUMBER, "told_ms": NUMBER,
    "kernels": (int,), "idle": NUMBER,
}  # fmt: skip


def script(*arguments: str, comfyui: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    environment = {**os.environ, "LORA2_COMFYUI": comfyui, "OMP_NUM_THREADS": "1"}
    environment.pop("COMFYUI_PATH", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments],
        capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
        env=environment | {"PYTHONUTF8": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the table of a whole run, the tiny one."""
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    done = script("--device", "cpu", "--tiny", "--json", str(file), comfyui=str(runtime.path))
    assert done.returncode == 0, done.stderr
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    return json.loads(file.read_text("utf-8")), done.stdout


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "size_px", "batch", "precision", "contestant"))


def test_every_cell_is_measured(whole: tuple[dict[str, Any], str]):
    found, _ = whole
    cells = plan.cells(tiny=True)
    assert [identity(row) for row in found["rows"]] == [
        (c.shape.model, c.shape.size, c.shape.batch, c.shape.precision, c.contestant) for c in cells
    ]
    for row in found["rows"]:
        assert row["status"] == "measured" and row["in_turns"] and row["steps_timed"] == 3, row
        assert row["kernels"] > 500 and row["checkpointing"]
        assert row["peak_allocated_mb"] is None and row["idle"] is None  # not measured on a CPU
        told = [row[name] for name in ("told_mb", "scaled_mb", "told_ms")]
        assert all(told) if row["preset"] else not any(told)
        if row["contestant"] == plan.FLOOR:
            assert row["of_floor"] == 1
    learning = {row["kernels"] for row in found["rows"] if row["contestant"] != plan.FLOOR}
    floors = {row["kernels"] for row in found["rows"] if row["contestant"] == plan.FLOOR}
    assert min(learning) > min(floors)


def test_the_json_says_where_it_comes_from(whole: tuple[dict[str, Any], str]):
    found, _ = whole
    assert found["schema"] == record.SCHEMA and found["tiny"] and found["minutes"] == 10
    assert found["torch"] == torch.__version__ and found["driver"] == "none"
    assert found["command"].startswith("python bench/gpu.py --device cpu --tiny --json ")
    assert found["commit"] == record.commit() and found["seconds"] > 1
    assert set(found["packages"]) == {"bitsandbytes", "peft", "safetensors", "transformers"}
    assert set(found["meanings"]) <= set(KINDS)
    for row in found["rows"]:
        assert list(row) == list(KINDS)
        for name, value in row.items():
            kinds = KINDS[name]
            nothing = value is None and kinds in (NUMBER, (int,))
            known = isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds)
            assert known or nothing, name


def lines_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_table_has_the_figures_of_the_json(whole: tuple[dict[str, Any], str]):
    found, text = whole
    lines = lines_of(text)
    assert len(lines) == len(found["rows"])
    for line, row in zip(lines, found["rows"], strict=True):
        assert len(line) == len(table.COLUMNS)
        cells = dict(zip(table.COLUMNS, line, strict=True))
        assert [cells["model"], int(cells["px"]), int(cells["batch"]), cells["in"]] == list(
            identity(row)[:4]
        )
        assert cells["who"].startswith(row["contestant"])
        assert float(cells["ms a step"].replace(",", "")) == pytest.approx(row["step_ms"], abs=0.06)
        assert float(cells["of the floor"]) == pytest.approx(row["of_floor"], abs=0.006)
        assert int(cells["kernels"].replace(",", "")) == row["kernels"]
        if row["preset"]:
            told, scaled = cells["GB told (scaled)"].rstrip(")").split(" (")
            assert 1e3 * float(told) == pytest.approx(row["told_mb"], abs=6)
            assert 1e3 * float(scaled) == pytest.approx(row["scaled_mb"], abs=6)
    head = text.split("\n\n")[0]
    assert found["commit"][:12] in head and found["torch"] in head and found["command"] in head


def test_what_a_card_measures_is_every_pair_of_settings():
    cells = plan.cells()
    shapes = list(dict.fromkeys(cell.shape for cell in cells))
    facts = [(s.model, s.size, s.batch, s.precision) for s in shapes]
    assert set(facts) == set(itertools.product(plan.MODELS, (1024, 768), (1, 4), plan.PRECISIONS))
    assert facts[0] == ("SDXL", 1024, 1, "bf16") and facts[-1] == ("KOALA-700m", 768, 4, "fp16")
    wanted = {preset for preset in plan.WANTED if preset in PRESETS}
    for shape in shapes:
        group = [cell for cell in cells if cell.shape == shape]
        assert set(plan.RIVALS) < {cell.contestant for cell in group}
        ours = [cell for cell in group if cell.preset]
        assert any(cell.config.rank.mode == "paper" for cell in ours)
        for cell in ours:
            assert cell.preset in wanted and cell.contestant.endswith(cell.preset)
            assert cell.config.optimizer.name == "adamw8bit" and cell.config.gradient_checkpointing
            assert (cell.config.resolution, cell.config.batch_size) == (shape.size, shape.batch)


def test_presets_keep_the_weights_as_they_say(monkeypatch: pytest.MonkeyPatch):
    """With the shared ones in RAM meanwhile, where a contestant is measured alone."""
    seen: list[tuple[str, str, bool, bool]] = []

    class Seen(Trainer):
        def __init__(self, network: Any, *others: Any):
            super().__init__(network, *others)
            base = network.layers[0].base
            kind = str(base.weight.dtype).removeprefix("torch.")
            seen.append((made[-1].preset, kind, stays_in_ram(base), frozen[-1].held == 0))

    made: list[plan.Cell] = []
    frozen: list[Any] = []

    def make(cell: plan.Cell, weights: Any, told: Any = None) -> Contestant:
        made.append(cell)
        frozen.append(weights)
        return contestants.make(cell, weights, told)

    monkeypatch.setattr(contestants, "Trainer", Seen)
    presets = "12 GB", "6 GB", "4 GB"
    rows = measure(group(*presets), make=make)
    plain, eight = "bfloat16", "float8_e4m3fn"
    kept = {"12 GB": (plain, False), "6 GB": (eight, False), "4 GB": (eight, True)}
    alone = [(preset, *kept[preset], preset != "12 GB") for preset in presets]
    assert seen == alone + [(preset, *kept[preset], False) for preset in presets]
    told = {preset: rows[f"LoRA², {preset}"].told_mb or 0 for preset in presets}
    # On a CPU what waits in RAM saves nothing, and its places come on top.
    assert told["12 GB"] > told["4 GB"] > told["6 GB"]
    assert all(row.in_turns for row in rows.values())


# --- what goes wrong ------------------------------------------------------------------------------


class Held:
    """What a weak reference can watch."""


def test_out_of_memory_in_the_middle_is_a_row_and_frees_what_was_held():
    watched: list[Any] = []

    def make(cell: plan.Cell, frozen: Any, told: Any = None) -> Contestant:
        if cell.contestant != plan.KOHYA:
            return contestants.make(cell, frozen, told)
        calls = itertools.count()

        def step() -> None:
            large = Held()
            watched.append(weakref.ref(large))
            if next(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        return stepping(step)

    rows = measure(group(plan.FLOOR, plan.KOHYA, plan.NODE), make=make)
    assert rows[plan.KOHYA].status == "does not fit"
    assert "20.00 GiB" in rows[plan.KOHYA].note and rows[plan.KOHYA].step_ms is None
    assert len(watched) == 2 and all(reference() is None for reference in watched)
    assert rows[plan.FLOOR].in_turns and rows[plan.NODE].in_turns


def test_side_by_side_they_may_not_fit():
    made: dict[str, int] = {}

    def make(cell: plan.Cell, frozen: Any, told: Any = None) -> Contestant:
        number = made[cell.contestant] = made.get(cell.contestant, 0) + 1

        def step() -> None:
            if number == 2 and cell.contestant == plan.KOHYA:
                raise RuntimeError("CUDA out of memory.")

        return stepping(step)

    rows = measure(group(plan.FLOOR, plan.KOHYA), make=make)
    for row in rows.values():
        assert row.status == "measured" and not row.in_turns and row.step_ms
        assert row.note == "timed alone: out of memory: CUDA out of memory."


def test_what_fails_for_a_reason_of_its_own_is_said():
    def make(*_: Any) -> Contestant:
        raise ValueError("Seven is odd.\nAnd so on.")

    (row,) = measure(group(plan.FLOOR), make=make).values()
    assert (row.status, row.note) == ("failed", "ValueError: Seven is odd.")
    found = {"rows": [row.as_dict()], "minutes": 1, "tiny": True, "device": "cpu"}
    facts = dict.fromkeys(("driver", "torch", "cuda", "comfyui", "commit", "date", "command"), "x")
    text = table.markdown({**facts, **found, "card": {"name": "card", "memory_mb": None}})
    assert lines_of(text)[0][4:6] == [f"{plan.FLOOR} (1)", "failed"]
    assert "1. ValueError: Seven is odd." in text


def test_packages_that_are_missing_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    rows = measure(group("12 GB", plan.KOHYA, plan.PEFT))
    assert rows[plan.PEFT].status == "missing" and "pip install peft" in rows[plan.PEFT].note
    for name in ("LoRA², 12 GB", plan.KOHYA):
        assert rows[name].status == "measured"
        assert rows[name].note.startswith("adamw stands in: ")
        assert "bitsandbytes" in rows[name].note


def test_a_comfyui_without_the_node_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "comfy_extras.nodes_train", None)
    (row,) = measure(group(plan.NODE)).values()
    assert row.status == "missing" and "TrainLoraNode" in row.note


def test_no_minutes_measure_nothing(
    runtime: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("LORA2_COMFYUI", str(runtime.path))
    file = tmp_path / "new" / "found.json"
    arguments = ["--device", "cpu", "--minutes", "0", "--json", str(file)]
    assert command.main(arguments) == 0
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert len(rows) == len(plan.cells()) and {row["status"] for row in rows} == {"not reached"}
    said = capsys.readouterr().out
    assert f"Not reached in 0 minutes, {len(rows)} cells: SDXL 1024 px batch 1 bf16 (" in said
    assert lines_of(said) == []


def test_minutes_that_end_in_a_node_s_loop_end_there():
    seconds = itertools.count()
    cells = group(plan.FLOOR, plan.NODE)
    rows = measure(cells, clock=lambda: next(seconds), until=6)
    assert rows[plan.FLOOR].status == "measured" and not rows[plan.FLOOR].in_turns
    assert rows[plan.NODE].status == "not reached"
    import comfy_extras.nodes_train as node

    assert node.trange.__module__.startswith("tqdm")  # its loop is its own again


def test_without_a_card_one_sentence(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LORA2_COMFYUI", str(runtime.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "--device cpu --tiny" in said.err


def test_without_comfyui_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    done = script("--device", "cpu", comfyui=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "LORA2_COMFYUI" in done.stderr
    monkeypatch.setattr(entering, "present_comfyui", lambda: None)
    assert command.main(["--device", "cpu"]) == 2
    assert "python3 tools/comfyui.py" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_known_at_once(
    runtime: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("LORA2_COMFYUI", str(runtime.path))
    (tmp_path / "file").write_text("")
    assert command.main(["--device", "cpu", "--json", str(tmp_path / "file" / "found.json")]) == 2
    assert "name another file" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--device=mps", "--minutes=-1", "--minutes=nan", "--minutes=x"])
def test_arguments_out_of_range_are_refused(wrong: str):
    with pytest.raises(SystemExit) as stopped:
        command.main([wrong])
    assert stopped.value.code == 2


def test_a_pack_in_somebody_else_s_repository_has_no_commit(tmp_path: Path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    inside = tmp_path / "custom_nodes"
    inside.mkdir()
    assert record.commit(inside) == "unknown"
    assert record.commit(tmp_path) == "unknown"  # no commit yet


def test_rows_and_shapes_refuse_what_makes_no_sense():
    cell = group(plan.FLOOR)[0]
    for status, note, figures in (
        ("good", "", {}),
        ("measured", "", {}),
        ("measured", "", {"step_ms": float("nan")}),
        ("failed", "", {}),
    ):
        with pytest.raises(ValueError):
            Row.of(cell, status, note, **figures)
    with pytest.raises(ValueError, match="at least 1"):
        plan.Shape("SDXL", 1024, 0, "bf16", True, "adamw")
    with pytest.raises(ValueError, match="take 1 or more"):
        Rounds(alone=0)


def test_words_for_what_ends_a_cell():
    outer = ValueError("no more")
    outer.__cause__ = MemoryError()
    assert running.said_of(outer)[0] == "does not fit"
    assert running.said_of(KeyError("x"))[0] == "failed"
