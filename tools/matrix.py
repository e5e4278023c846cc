#!/usr/bin/env python3
"""Run the tests that meet ComfyUI in several of them, one after the other, and print a table.

    python3 tools/matrix.py PATH[@FRONTEND] ... [--only GROUP] [--again] [--keep]

PATH is the folder of a ComfyUI (`.comfyui` for the packaged one), FRONTEND another version of its
front end. What has passed is written down in `out/matrix/` and not run again while the pack is the
same, so an interrupted run goes on where it stopped, and a second run does only what was red.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
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


@dataclass(frozen=True)
class Result:
    """How one group of tests went in one ComfyUI; `seconds` by the clock.

    Raises ValueError for counts or times below 0.
    """

    comfyui: str
    frontend: str
    group: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    pack: str  # the pack's state, see `state_of_pack`

    def __post_init__(self) -> None:
        figures = (self.passed, self.failed, self.skipped, self.seconds)
        if min(figures) < 0:
            raise ValueError(f"{figures} has a figure below 0; run the group again with --again.")

    @property
    def green(self) -> bool:
        """Whether tests ran and none failed."""
        return self.passed > 0 and self.failed == 0

    def text(self) -> str:
        """Return "passed/failed/skipped, time" for the table."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{self.passed}/{self.failed}/{self.skipped}, {minutes}:{seconds:02}"


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


def counts(report: Path) -> tuple[int, int, int]:
    """Return how many tests of a JUnit report passed, failed and were skipped.

    Raises ValueError where there is none, which is so when pytest ended before any test.
    """
    try:
        suite = ET.parse(report).getroot().find("testsuite")
    except (OSError, ET.ParseError) as error:
        raise ValueError(f"{report} is no report of tests ({error})") from None
    if suite is None:
        raise ValueError(f"{report} has no testsuite")
    total, *others = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    return total - sum(others), others[0] + others[1], others[2]


def run_group(runtime: Runtime, folder: Path, group: str, processes: int | None) -> Result:
    """Run one group of tests in one ComfyUI; its report and output go to `folder`.

    Raises ValueError when pytest itself fails: an error of collection, or no memory left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, log = folder / f"{group}.xml", folder / f"{group}.log"
    report.unlink(missing_ok=True)
    command = [str(runtime.python), "-m", "pytest", "-ra", f"--junitxml={report}"]
    command += side_by_side(processes)
    started = time.monotonic()
    pack = state_of_pack()
    with log.open("wb") as output:
        subprocess.run(
            [*command, f"tests/{group}"],
            cwd=ROOT,
            env=variables_for(runtime, command),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - started
    try:
        figures = counts(report)
    except ValueError as error:
        raise ValueError(f"{error}; the end of {log} says why") from None
    version, frontend = Checkout(runtime.path).version, installed_frontend(runtime)
    return Result(version, frontend, group, *figures, round(seconds, 1), pack)


def read(file: Path) -> Result | None:
    """Return a result that was written down; none if there is none that can be read."""
    try:
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(file: Path, result: Result) -> None:
    """Write a result down, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    temporary.replace(file)


def table(rows: list[list[Result]], pack: str) -> str:
    """Return the table, in Markdown; * is a result of an earlier state of the pack."""
    lines = [f"| ComfyUI | front end | {' | '.join(GROUPS)} |", f"|{' --- |' * (2 + len(GROUPS))}"]
    for results in rows:
        by_group = {one.group: one for one in results}
        cells = [results[0].comfyui, results[0].frontend]
        for group in GROUPS:
            one = by_group.get(group)
            cells.append("-" if one is None else one.text() + ("*" if one.pack != pack else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "passed/failed/skipped, minutes:seconds"])


def results_of(path: str, frontend: str | None, options: argparse.Namespace) -> list[Result]:
    """Run what is to be run in one ComfyUI, and return all that is known of it."""
    runtime = runtime_for(path, frontend)
    name = f"{Checkout(runtime.path).version}-{installed_frontend(runtime)}"
    results = []
    for group in GROUPS:
        file = RESULTS / name / f"{group}.json"
        known = read(file)
        fresh = known and known.green and (options.keep or known.pack == state_of_pack())
        if (options.only and group not in options.only) or (fresh and not options.again):
            results += [known] if known else []
            continue
        say(f"ComfyUI {name}: {group} …")
        result = run_group(runtime, file.parent, group, options.processes)
        write(file, result)
        say(f"ComfyUI {name}: {group} {result.text()} ({file.with_suffix('.log')})")
        results.append(result)
    return results


def main() -> int:
    """Run the matrix; 0 if nothing is red."""
    parser = argparse.ArgumentParser(description="Run the tests of LoRA² in several ComfyUIs.")
    parser.add_argument("comfyui", metavar="PATH[@FRONTEND]", nargs="+")
    parser.add_argument("--only", choices=GROUPS, action="append", help="run this group alone")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument(
        "--keep", action="store_true", help="let stand what passed in an earlier state of the pack"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="so many processes of pytest")
    options = parser.parse_args()
    rows = []
    try:
        for path, frontend in targets_of(options.comfyui):
            rows.append(results_of(path, frontend, options))
    except SetupError as error:
        say(str(error))
        return error.code
    except ValueError as error:
        say(f"{error}.")
        return 1
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on from here.")
        return 130
    rows = [row for row in rows if row]
    print(table(rows, state_of_pack()))
    return 0 if rows and all(one.green for row in rows for one in row) else 1


if __name__ == "__main__":
    sys.exit(main())
