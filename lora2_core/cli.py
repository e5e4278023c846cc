"""Without ComfyUI: look inside LoRA files, make them smaller, add them; score pictures.

From the pack's folder: ``python -m lora2_core inspect|resize|merge|score …``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .config.checks import ConfigError
from .config.load import ORDERS, Limits
from .files.header import ENDINGS, LoRAFileError
from .reports import comparison, inspector, scoring, vision
from .reports.inspector import FileReport
from .reports.scoring import Picture, Subject
from .reports.vision import JudgeError
from .resizing.resize import merge_files, resize_file
from .tiny_sdxl.judges import likeness_judges

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PROMPT = "prompt.txt"  # in the folder of a prompt's pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 with a sentence on the standard error if not."""
    parser = argparse.ArgumentParser(
        prog="python -m lora2_core",
        description="Look inside LoRA files, resize and merge them; score pictures.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_inspect(commands)
    _add_resize(commands)
    _add_merge(commands)
    _add_score(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (LoRAFileError, ConfigError, JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
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
        _picture_of(reports).save(options.png, format="PNG")
    return failed


def _picture_of(reports: list[FileReport]) -> Image.Image:
    """The rank map of one file, or of several side by side."""
    if len(reports) == 1:
        return reports[0].picture()
    return comparison.compare(
        [comparison.Shown(Path(r.name).stem, r.components, r.nbytes) for r in reports]
    )


def _add_resize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("resize", help="write a smaller file of any LoRA")
    parser.add_argument("source", type=Path, metavar="FILE")
    parser.add_argument("target", type=Path, metavar="NEW")
    _add_limits(parser)
    parser.set_defaults(run=_resize)


def _resize(options: argparse.Namespace) -> int:
    target = _free(options.target, options.force)
    print(resize_file(options.source, target, _limits(options), not options.force).text())
    return 0


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("merge", help="write the sum of LoRAs as one file")
    parser.add_argument("sources", nargs="+", metavar="FILE[=WEIGHT]", help="weight 1 if left out")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW")
    _add_limits(parser)
    parser.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> int:
    target = _free(options.out, options.force)
    sources = [_weighted(text) for text in options.sources]
    print(merge_files(sources, target, _limits(options), not options.force).text())
    return 0


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


def _weighted(text: str) -> tuple[Path, float]:
    """``cat.safetensors=0.5``; a name that holds = itself is meant where there is such a file."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"{text} does not end in a weight; write FILE or FILE=0.5.") from None


def _free(path: Path, force: bool) -> Path:
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path} must end in {' or '.join(ENDINGS)}, or no loader will list it.")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; choose another name, or add --force.")
    return path


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "score",
        help="measure how much pictures look like a subject and like their prompts",
        description=(
            "REAL holds a folder of photos for each subject. PAINTED holds a folder of the same "
            f"name, in it one for each prompt, with its pictures and the prompt as {_PROMPT}."
        ),
    )
    parser.add_argument("painted", type=Path, metavar="PAINTED")
    parser.add_argument("real", type=Path, metavar="REAL")
    name = "a folder, or a name in Hugging Face's cache; none: leave it out"
    parser.add_argument("--dino", default=vision.DINO, help=name)
    parser.add_argument("--clip", default=vision.CLIP, help=name)
    parser.add_argument(
        "--without", default="", metavar="WORDS", help="words that CLIP-T is not asked for: sks"
    )
    parser.add_argument(
        "--demo", action="store_true", help="also the demo model's judges, for its drawn world"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    """Print the scores. Raises ConfigError or JudgeError."""
    subjects = _read_subjects(options.painted, options.real)
    chosen = vision.judges(
        _folder(options.dino), _folder(options.clip), options.without, options.device
    )
    if options.demo:
        chosen += likeness_judges()
    scores = scoring.score(subjects, chosen)
    if options.json:
        print(json.dumps([one.as_dict() for one in scores], indent=2))
    else:
        print(scoring.table(scores))
    return 0


def _folder(name: str) -> Path | None:
    return None if name == "none" else vision.located(name)


def _read_subjects(painted: Path, real: Path) -> list[Subject]:
    """Every subject of two folders. Raises ConfigError where one of them lacks something."""
    for folder in (painted, real):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give one that holds a folder a subject.")
    names = [one.name for one in _folders(painted)]
    if not names:
        raise ConfigError(f"{painted} holds no folder; put each subject's pictures into one.")
    return [_subject(painted / name, real / name) for name in names]


def _subject(painted: Path, real: Path) -> Subject:
    if not real.is_dir():
        raise ConfigError(f"{real} is missing; put the photos of {painted.name} there.")
    prompts: dict[str, list[Picture]] = {}
    for folder in _folders(painted):
        words = folder / _PROMPT
        if not words.is_file():
            raise ConfigError(f"{words} is missing; write the prompt of these pictures into it.")
        pictures = prompts.setdefault(words.read_text("utf-8").strip(), [])
        pictures += _pictures(folder)
    return Subject(painted.name, _pictures(real), prompts)


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] != ".")


def _pictures(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.suffix.lower() in _ENDINGS)
