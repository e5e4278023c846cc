"""The command line of bench/gpu.py."""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import runtime

NO_COMFYUI = (
    "The U-Net's classes are ComfyUI's, and there is none here: set LORA2_COMFYUI to the folder of "
    "one, or have one set up in .comfyui by python3 tools/comfyui.py."
)
WAITED = 2  # the exit code where something is missing


class Unable(Exception):
    """Nothing can be measured here; the message is one sentence for people."""


def main(arguments: Sequence[str]) -> int:
    """0; 1 where a cell failed for a reason of its own; 2, with one sentence, without a start."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own talk
    try:
        started = time.monotonic()
        comfyui = _enter(options.device)
        return _measure(options, comfyui, arguments, started)
    except Unable as error:
        print(error, file=sys.stderr)
        return WAITED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description="Measure a training step on a card."
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=runtime.ROOT / "out" / "gpu.json",
        help="where the JSON object goes; out/gpu.json unless set",
    )  # fmt: skip
    parser.add_argument("--device", type=_device, default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="begin nothing after them")
    return parser


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cuda, cuda:N nor cpu")
    return text


def _minutes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes from 0 on")
    return found


def _enter(device: str) -> Path:
    """Make ComfyUI importable, on ``device``; its folder. Raises Unable."""
    try:
        comfyui = runtime.present_comfyui()
    except Exception as error:  # of the tools, whose message is one for people
        raise Unable(f"{NO_COMFYUI} ({error})") from error
    if comfyui is None:
        raise Unable(NO_COMFYUI)
    try:
        from .meters import meter
    except ImportError as error:
        raise Unable(
            f"PyTorch cannot be loaded ({error}): run this with the Python that runs ComfyUI."
        ) from error
    try:
        meter(device)
    except ValueError as error:
        raise Unable(str(error)) from error
    if "comfy.model_management" in sys.modules:  # a process enters once
        return comfyui
    try:
        runtime.enter_comfyui(comfyui, cpu=device == "cpu")
        from . import contestants  # noqa: F401  # imports all that is used of ComfyUI
    except ImportError as error:
        raise Unable(
            f"The ComfyUI in {comfyui} cannot be loaded ({error}): run this with the Python that "
            f'runs it, or install what it needs: pip install -r "{comfyui / "requirements.txt"}".'
        ) from error
    gc.freeze()  # what was imported need not be looked through after every contestant
    return comfyui


def _measure(
    options: argparse.Namespace, comfyui: Path, arguments: Sequence[str], started: float
) -> int:
    from . import plan, record, table
    from .meters import meter
    from .rows import FAILED, Row
    from .running import TINY, Bench, Rounds

    measured = meter(options.device)
    until = started + 60 * options.minutes
    bench = Bench(measured, TINY if options.tiny else Rounds(), until, options.tiny, say)
    rows: list[Row] = []
    found: dict[str, Any] = {}

    def keep() -> dict[str, Any]:
        taken = round(time.monotonic() - started, 1)
        circumstances = {"minutes": options.minutes, "seconds": taken, "tiny": options.tiny}
        kept = record.record(rows, measured.device, comfyui, arguments, **circumstances)
        try:
            record.write(kept, options.json)
        except OSError as error:
            raise Unable(
                f"--json is {options.json}, which cannot be written ({error}): name another file."
            ) from error
        return kept

    found = keep()  # a place that cannot be written to is known before, not after ten minutes
    for more in bench.run(plan.cells(options.tiny)):
        rows += more
        if time.monotonic() < until:  # what is lost by a crash is one shape
            found = keep()
    found = keep()
    print(table.markdown(found))
    print(f"{options.json} has all of it.", file=sys.stderr)
    return int(any(row.status == FAILED for row in rows))


def say(row: Any) -> None:
    """One line for who waits."""
    if row.status == "not reached":  # the table counts these
        return
    figure = f"{row.step_ms:,.1f} ms" if row.step_ms else row.status
    where = f"{row.model}, {row.size_px} px, batch {row.batch}, {row.precision}"
    print(f"{where}: {row.contestant}: {figure}", file=sys.stderr, flush=True)
