"""The tiny base model from the command line: python -m tools.tiny_sdxl sheet --out DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .sheets import write_sheets


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it did its work."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_sdxl")
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="write contact sheets of all that is drawn")
    sheet.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    sheet.add_argument("--size", type=int, default=192, help="pixels rendered")
    sheet.add_argument("--tile", type=int, default=192, help="pixels shown")
    options = parser.parse_args(arguments)
    for path in write_sheets(options.out, options.size, options.tile):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
