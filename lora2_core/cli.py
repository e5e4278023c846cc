"""Without ComfyUI: look inside LoRA files, make them smaller, add them; score pictures.

From the pack's folder: ``python -m lora2_core inspect|resize|merge|score …``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli_inspect, cli_score, resize
from .checks import ConfigError
from .lora_file import LoRAFileError
from .shrink import ORDERS, Limits
from .vision import JudgeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 with a sentence on the standard error if not."""
    parser = argparse.ArgumentParser(
        prog="python -m lora2_core",
        description="Look inside LoRA files, resize and merge them; score pictures.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cli_inspect.add_parser(commands)
    _add_resize(commands)
    _add_merge(commands)
    cli_score.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (LoRAFileError, ConfigError, JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_resize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("resize", help="write a smaller file of any LoRA")
    parser.add_argument("source", type=Path, metavar="FILE")
    parser.add_argument("target", type=Path, metavar="NEW")
    _add_limits(parser)
    parser.set_defaults(run=_resize)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("merge", help="write the sum of LoRAs as one file")
    parser.add_argument("sources", nargs="+", metavar="FILE[=WEIGHT]", help="weight 1 if left out")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW")
    _add_limits(parser)
    parser.set_defaults(run=_merge)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, metavar="N", help="the largest rank of any layer")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="keep this share of what changes, 0.99"
    )
    parser.add_argument("--megabytes", type=float, metavar="MB", help="the largest file, 10⁶ bytes")
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0], help="what goes first")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(options.rank, options.energy, options.megabytes, options.order)


def _resize(options: argparse.Namespace) -> int:
    target = _free(options.target, options.force)
    print(resize.resize(options.source, target, _limits(options)).text())
    return 0


def _merge(options: argparse.Namespace) -> int:
    target = _free(options.out, options.force)
    sources = [_weighted(text) for text in options.sources]
    print(resize.merge(sources, target, _limits(options)).text())
    return 0


def _weighted(text: str) -> tuple[Path, float]:
    """``cat.safetensors=0.5``; a name that holds = itself is meant where there is such a file."""
    path, found, weight = text.rpartition("=")
    if not found or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"{text} does not end in a weight; write FILE or FILE=0.5.") from None


def _free(path: Path, force: bool) -> Path:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} must end in .safetensors, or no loader will list it.")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; choose another name, or add --force.")
    return path
