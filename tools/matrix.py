#!/usr/bin/env python3
"""Run the tests that meet ComfyUI in several of them, one after the other, and print a table.

    python3 tools/matrix.py PATH[@FRONTEND] ... [--only GROUP] [--again] [--keep]

PATH is the folder of a ComfyUI (`.comfyui` for the packaged one), FRONTEND another version of its
front end. What has passed is written down in `out/matrix/`, by files of tests, and not run again
while the pack is the same: an interrupted run goes on with the next group, and a second one does
only what was red.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from checkouts import Checkout, installed_frontend, runtime_for
from comfyui import ROOT, Runtime
from environment import SetupError, say
from suite import GROUPS, side_by_side, variables_for

RESULTS = ROOT / "out" / "matrix"
# What decides how the tests go.
_SOURCES = ("__init__.py", "pyproject.toml", "lora2_core", "locales", "nodes", "photos", "tests")
_SOURCES += ("tools", "web", "workflows")
# A column of the table: the folder of its tests, and the variables that they run with.
COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    **{group: (group, {}) for group in GROUPS},
    # Host tests again, with every model held as on an NVIDIA card (tests/host/card.py).
    "dynamic": ("host", {"LORA2_DYNAMIC_VRAM": "1"}),
}


@dataclass(frozen=True)
class Result:
    """How one file of tests went in one ComfyUI; `seconds` are those that its tests took.

    Raises ValueError for counts or times below 0.
    """

    file: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    pack: str  # the pack's state, see `state_of_pack`

    def __post_init__(self) -> None:
        figures = (self.passed, self.failed, self.skipped, self.seconds)
        if min(figures) < 0:
            raise ValueError(f"{self.file}: {figures} has a figure below 0; run it with --again")

    @property
    def green(self) -> bool:
        """Whether tests ran and none failed."""
        return self.passed + self.skipped > 0 and self.failed == 0


@dataclass(frozen=True)
class Row:
    """A line of the table: the results of each group in one ComfyUI, none where it was not run."""

    comfyui: str
    frontend: str
    groups: dict[str, list[Result]]

    @property
    def green(self) -> bool:
        """Whether something was run, and nothing is red."""
        return any(self.groups.values()) and all(
            result.green for results in self.groups.values() for result in results
        )


def targets_of(words: Iterable[str]) -> list[tuple[str, str | None]]:
    """Return the folder and the wished front end of each PATH[@FRONTEND]."""
    found = []
    for word in words:
        path, at, version = word.rpartition("@")
        wished = at and version[:1].isdigit() and os.sep not in version
        found.append((path, version) if wished else (word, None))
    return found


def state_of_pack(root: Path = ROOT) -> str:
    """Return a hash of all files of the pack that a test could meet."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        place = root / source
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def read_report(report: Path, pack: str) -> list[Result]:
    """Return what a JUnit report of pytest says of each file of tests.

    Raises ValueError where there is none, which is so when pytest ended before its end.
    """
    try:
        cases = list(ET.parse(report).getroot().iter("testcase"))
    except (OSError, ET.ParseError) as error:
        raise ValueError(f"{report} is no report of tests ({error})") from None
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    seconds: dict[str, float] = defaultdict(float)
    for case in cases:
        # Of a test, its module; of a file that could not be imported, the module is the name.
        module = case.get("classname") or case.get("name", "")
        file = module.replace(".", "/") + ".py"
        outcomes = {child.tag for child in case}
        kind = 1 if outcomes & {"failure", "error"} else 2 if "skipped" in outcomes else 0
        counts[file][kind] += 1
        seconds[file] += float(case.get("time", 0))
    results = []
    for file, (passed, failed, skipped) in sorted(counts.items()):
        results.append(Result(file, passed, failed, skipped, round(seconds[file], 1), pack))
    return results


def run_files(
    runtime: Runtime, folder: Path, group: str, files: list[str], processes: int | None
) -> list[Result]:
    """Run a column's files of tests in one ComfyUI; report and output go to `folder`.

    Raises ValueError when pytest itself fails: for want of memory, or at an error of its options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, log = folder / f"{group}.xml", folder / f"{group}.log"
    report.unlink(missing_ok=True)
    command = [str(runtime.python), "-m", "pytest", "-ra", f"--junitxml={report}"]
    command += [*side_by_side(processes), *files]
    pack = state_of_pack()
    with log.open("wb") as output:
        subprocess.run(
            command,
            cwd=ROOT,
            env=variables_for(runtime, command) | COLUMNS[group][1],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    try:
        return read_report(report, pack)
    except ValueError as error:
        raise ValueError(f"{error}; the end of {log} says why") from None


def read(file: Path) -> dict[str, Result]:
    """Return the results that were written down, by their files; none that cannot be read."""
    try:
        found = [Result(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return {}
    return {result.file: result for result in found}


def write(file: Path, results: Iterable[Result]) -> None:
    """Write results down, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(one) for one in results], indent=1), encoding="utf-8")
    temporary.replace(file)


def text(results: list[Result], pack: str) -> str:
    """Return "passed/failed/skipped, minutes:seconds" of a group; * where one is of earlier."""
    if not results:
        return "-"
    passed, failed, skipped = (
        sum(getattr(one, kind) for one in results) for kind in ("passed", "failed", "skipped")
    )
    minutes, seconds = divmod(round(sum(one.seconds for one in results)), 60)
    star = "*" if any(one.pack != pack for one in results) else ""
    return f"{passed}/{failed}/{skipped}, {minutes}:{seconds:02}{star}"


def table(rows: list[Row], pack: str) -> str:
    """Return the table, in Markdown."""
    lines = [f"| ComfyUI | front end | {' | '.join(COLUMNS)} |"]
    lines.append(f"|{' --- |' * (2 + len(COLUMNS))}")
    for row in rows:
        cells = [text(row.groups.get(group, []), pack) for group in COLUMNS]
        lines.append(f"| {' | '.join([row.comfyui, row.frontend, *cells])} |")
    legend = (
        "passed/failed/skipped, minutes:seconds; * with results of an earlier state of the pack"
    )
    return "\n".join([*lines, "", legend])


def row_of(path: str, frontend: str | None, options: argparse.Namespace) -> Row:
    """Run what is to be run in one ComfyUI, and return all that is known of it."""
    runtime = runtime_for(path, frontend)
    row = Row(Checkout(runtime.path).version, installed_frontend(runtime), {})
    name = f"{row.comfyui}-{row.frontend}"
    for group, (folder, _) in COLUMNS.items():
        place = RESULTS / name / f"{group}.json"
        files = sorted(
            f.relative_to(ROOT).as_posix() for f in (ROOT / "tests" / folder).glob("test_*.py")
        )
        known = {file: one for file, one in read(place).items() if file in files}
        if not options.only or group in options.only:
            pack = state_of_pack()
            stands = {
                f for f, one in known.items() if one.green and (options.keep or one.pack == pack)
            }
            wanted = [file for file in files if options.again or file not in stands]
            if wanted:
                say(f"ComfyUI {name}: {len(wanted)} of {len(files)} files of {group} …")
                fresh = run_files(runtime, place.parent, group, wanted, options.processes)
                known |= {result.file: result for result in fresh}
                write(place, known.values())
            say(f"ComfyUI {name}: {group} {text([*known.values()], pack)}")
        row.groups[group] = list(known.values())
    return row


def main() -> int:
    """Run the matrix; 0 if nothing is red."""
    parser = argparse.ArgumentParser(description="Run the tests of LoRA² in several ComfyUIs.")
    parser.add_argument("comfyui", metavar="PATH[@FRONTEND]", nargs="+")
    parser.add_argument("--only", choices=COLUMNS, action="append", help="run this group alone")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument(
        "--keep", action="store_true", help="let stand what passed in an earlier state of the pack"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="so many processes of pytest")
    options = parser.parse_args()
    try:
        rows = [row_of(*target, options) for target in targets_of(options.comfyui)]
    except SetupError as error:
        say(str(error))
        return error.code
    except ValueError as error:
        say(f"{error}.")
        return 1
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on from here.")
        return 130
    print(table(rows, state_of_pack()))
    return 0 if all(row.green for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
