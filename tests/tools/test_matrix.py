"""The matrix of versions: what is run, what is not run again, and what the table says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora2_tools import matrix
from lora2_tools.comfyui import Runtime

PANEL = "tests/browser/test_panel.py"
REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.host.test_a" name="one" time="1.25"/>
<testcase classname="tests.host.test_a" name="two" time="0.5"><failure/></testcase>
<testcase classname="tests.host.test_b" name="one" time="0"><skipped/></testcase>
<testcase classname="tests.host.test_b" name="two" time="2"><error/></testcase>
<testcase classname="" name="tests.host.test_c" time="0"><error>not imported</error></testcase>
</testsuite></testsuites>"""


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
    assert matrix.read_report(report, "now") == [
        matrix.Result("tests/host/test_a.py", 1, 1, 0, 1.8, "now"),
        matrix.Result("tests/host/test_b.py", 0, 1, 1, 2.0, "now"),
        matrix.Result("tests/host/test_c.py", 0, 1, 0, 0.0, "now"),
    ]
    for broken in ("", "<testsuites>", None):
        report.unlink() if broken is None else report.write_text(broken)
        with pytest.raises(ValueError, match=r"host\.xml"):
            matrix.read_report(report, "now")


@pytest.mark.parametrize(
    ("figures", "green"),
    [((1, 0, 0), True), ((0, 0, 2), True), ((3, 1, 0), False), ((0, 0, 0), False)],
)
def test_green_means_that_tests_ran_and_none_failed(figures: tuple[int, ...], green: bool) -> None:
    result = matrix.Result("a.py", *figures, 1.0, "now")
    assert result.green == green == matrix.Row("1", "1", {"host": [result], "server": []}).green
    with pytest.raises(ValueError, match="below 0"):
        matrix.Result("a.py", -1, 0, 0, 1.0, "now")


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
    """The files that were run; test_panel is red at first."""
    files: list[str] = []
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "requirements.txt").write_text("")
    (comfyui / "comfyui_version.py").write_text("__version__ = '0.99.0'")

    def run_files(_: Any, folder: Path, __: str, wanted: list[str], ___: Any) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        files.extend(wanted)
        red = {PANEL} if files.count(PANEL) == 1 else set()
        state = matrix.state_of_pack()
        return [matrix.Result(one, 3, int(one in red), 1, 1.5, state) for one in wanted]

    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "out")
    monkeypatch.setattr(matrix, "runtime_for", lambda *_: Runtime(comfyui, Path("python"), False))
    monkeypatch.setattr(matrix, "installed_frontend", lambda _: "1.5")
    monkeypatch.setattr(matrix, "run_files", run_files)
    monkeypatch.setattr(matrix, "state_of_pack", lambda: "now")
    return files


def _row(**options: Any) -> matrix.Row:
    given = {"only": None, "again": False, "keep": False, "processes": None, **options}
    return matrix.row_of("x", None, SimpleNamespace(**given))  # type: ignore[arg-type]


def test_a_second_run_does_only_what_was_red(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not _row().green
    every = list(ran)
    assert {Path(file).parent.name for file in every} == set(matrix.GROUPS)
    ran.clear()
    ran.append(PANEL)  # it is red the first time alone
    assert _row().green and ran == [PANEL, PANEL]
    assert _row().green and ran == [PANEL, PANEL]
    monkeypatch.setattr(matrix, "state_of_pack", lambda: "later")
    kept = _row(keep=True)
    assert kept.green and len(ran) == 2 and matrix.table([kept], "later").count("*") == 5
    (tmp_path / "out" / "0.99.0-1.5" / "host.json").write_text('[{"passed": 3}]')
    host = every[: len(set(every)) - len([file for file in every if "/host/" not in file])]
    _row(only=["host"], keep=True)
    assert ran[2:] == host, "what cannot be read counts for nothing"
    _row()
    assert ran[2:] == every, "what an earlier state has passed is run again"
    _row(again=True, only=["host"])
    assert ran[2 + len(every) :] == host


def test_the_table_shows_every_group(ran: list[str]) -> None:
    first, whole = _row(only=["browser"]), _row()
    count = len([file for file in ran if "/browser/" in file]) - 1  # one of them twice
    shown = matrix.table([first, whole], "now")
    seconds = f"0:{round(1.5 * count):02}"
    assert f"| 0.99.0 | 1.5 | - | - | {3 * count}/1/{count}, {seconds} |" in shown
    assert f"{3 * count}/0/{count}, {seconds} |" in shown
