"""``python -m lora2_core inspect FILE…``: what is inside, as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from . import comparison, inspector
from .inspector import FileReport
from .lora_file import LoRAFileError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand ``inspect``."""
    parser = commands.add_parser("inspect", help="show what is inside LoRA files")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--png", type=Path, metavar="PNG", help="write the rank map, or all of them"
    )
    parser.add_argument(
        "--measure", action="store_true", help="read the tensors too: norms, effective ranks"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show every file that can be read; 1 if one could not be."""
    reports: list[FileReport] = []
    failed = 0
    for path in options.files:
        try:
            reports.append(inspector.inspect(path, options.measure))
        except LoRAFileError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
    if options.json:
        print(json.dumps([report.as_dict() for report in reports], indent=1))
    else:
        print("\n".join(report.text() for report in reports), end="")
        if len(reports) > 1:
            print("\n" + inspector.side_by_side(reports), end="")
    if options.png and reports:
        picture_of(reports).save(options.png, format="PNG")
    return failed


def picture_of(reports: list[FileReport]) -> Image.Image:
    """The rank map of one file, or of several side by side."""
    if len(reports) == 1:
        return reports[0].picture()
    return comparison.compare(
        [comparison.Shown(Path(r.name).stem, r.components, r.nbytes) for r in reports]
    )
