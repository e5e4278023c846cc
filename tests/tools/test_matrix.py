"""The matrix of versions: what is run, what is not run again, and what the table says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora2_tools import matrix
from lora2_tools.comfyui import Runtime

REPORT = """<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>"""


def test_a_front_end_is_told_from_a_folder() -> None:
    words = ["a/0.33.0", "a/0.33.0@1.58.1", "me@home/ComfyUI", "a@2.0/ComfyUI"]
    assert matrix.targets_of(words) == [
        ("a/0.33.0", None),
        ("a/0.33.0", "1.58.1"),
        ("me@home/ComfyUI", None),
        ("a@2.0/ComfyUI", None),
    ]


def test_counts_are_pytest_s(tmp_path: Path) -> None:
    report = tmp_path / "host.xml"
    report.write_text(REPORT)
    assert matrix.counts(report) == (5, 2, 2)
    for broken in ("", "<testsuites/>", None):
        report.unlink() if broken is None else report.write_text(broken)
        with pytest.raises(ValueError, match=r"host\.xml"):
            matrix.counts(report)


def test_a_change_of_the_pack_is_a_new_state(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    file = tmp_path / "web" / "main.js"
    states = []
    for text in ("a", "b"):
        file.write_text(text)
        states.append(matrix.state_of_pack(tmp_path))
    (tmp_path / "README.md").write_text("No test reads it.")
    states.append(matrix.state_of_pack(tmp_path))
    file.rename(file.with_name("other.js"))
    states.append(matrix.state_of_pack(tmp_path))
    assert states[1] == states[2] and len(set(states)) == 3


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups that were run: browser is red at first."""
    groups: list[str] = []
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    for name in ("requirements.txt", "comfyui_version.py"):
        (comfyui / name).write_text("__version__ = '0.99.0'" if name.endswith(".py") else "")
    runtime = Runtime(comfyui, Path("python"), False)

    def run_group(_: Any, folder: Path, group: str, __: Any) -> matrix.Result:
        folder.mkdir(parents=True, exist_ok=True)
        groups.append(group)
        red = group == "browser" and groups.count(group) == 1
        return matrix.Result("0.99.0", "1.5", group, 3, int(red), 1, 61.2, matrix.state_of_pack())

    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "out")
    monkeypatch.setattr(matrix, "runtime_for", lambda *_: runtime)
    monkeypatch.setattr(matrix, "installed_frontend", lambda _: "1.5")
    monkeypatch.setattr(matrix, "run_group", run_group)
    monkeypatch.setattr(matrix, "state_of_pack", lambda: "now")
    return groups


def _results(**options: Any) -> list[matrix.Result]:
    given = {"only": None, "again": False, "keep": False, "processes": None, **options}
    return matrix.results_of("x", None, SimpleNamespace(**given))  # type: ignore[arg-type]


def test_a_second_run_does_only_what_was_red(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [one.green for one in _results()] == [True, True, False]
    assert all(one.green for one in _results())
    assert ran == ["host", "server", "browser", "browser"]
    monkeypatch.setattr(matrix, "state_of_pack", lambda: "later")
    kept = _results(keep=True)
    assert len(ran) == 4 and matrix.table([kept], "later").count("*") == 3
    (tmp_path / "out" / "0.99.0-1.5" / "host.json").write_text('{"passed": 3}')
    _results(only=["host"], keep=True)
    assert ran[4:] == ["host"], "what cannot be read counts for nothing"
    _results()
    assert ran[5:] == ["server", "browser"], "what an earlier state has passed is run again"
    _results(again=True, only=["server"])
    assert ran[7:] == ["server"]


def test_the_table_shows_every_group(ran: list[str]) -> None:
    shown = matrix.table([_results(only=["host"]), _results()], "now")
    assert "| 0.99.0 | 1.5 | 3/0/1, 1:01 | - | - |" in shown
    assert "| 0.99.0 | 1.5 | 3/0/1, 1:01 | 3/0/1, 1:01 | 3/1/1, 1:01 |" in shown
