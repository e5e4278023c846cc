"""``python -m lora2_core score``: DINO, CLIP-I and CLIP-T of folders of pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import demo_judges, scoring, vision
from .checks import ConfigError
from .scoring import Picture, Subject

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PROMPT = "prompt.txt"  # in the folder of a prompt's pictures


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the scores. Raises ConfigError or JudgeError."""
    subjects = read(options.painted, options.real)
    chosen = vision.judges(
        _folder(options.dino), _folder(options.clip), options.without, options.device
    )
    if options.demo:
        chosen += demo_judges.likeness_judges()
    found = scoring.score(subjects, chosen)
    if options.json:
        print(json.dumps([one.as_dict() for one in found], indent=2))
    else:
        print(scoring.table(found))
    return 0


def _folder(name: str) -> Path | None:
    return None if name == "none" else vision.located(name)


def read(painted: Path, real: Path) -> list[Subject]:
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
