#!/usr/bin/env python3
"""Write the English of locales/en: from the nodes' own schemas, and from the web part's fallbacks.

    python3 tools/locales.py [--comfyui PATH]

English is written once, where it is used. The files are what ComfyUI's front end reads, and what a
translation is held against: names that a language lacks, or has too many, are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfyui import ROOT, ensure
from environment import SetupError, say

LOCALES = ROOT / "locales"
SCRIPTS = ROOT / "web" / "lib"
SOURCE = "en"
PREFIX = "LoRA2"  # of our nodes' ids
SECTION = "lora2"  # of main.json
NODES, WORDS = "nodeDefs.json", "main.json"

Texts = dict[str, Any]

# The fallbacks of the web part: `const english = {key: "text", …};` and `define({…});`.
_BLOCK = re.compile(r"^(?:const english = |define\()\{(.*?)^\}\)?;", re.S | re.M)
_TEXT = r'"(?:\\.|[^"\\\n])*"'
_WORD = re.compile(rf"^\s+(\w+):\s+({_TEXT}(?:\s*\+\s*{_TEXT})*),?$", re.M)


def node_texts(object_info: dict[str, Any]) -> Texts:
    """Return what ComfyUI's /object_info says of our nodes, in the form of nodeDefs.json."""
    return {
        name: _node(info) for name, info in sorted(object_info.items()) if name.startswith(PREFIX)
    }


def _node(info: dict[str, Any]) -> Texts:
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    names = info["output_name"]
    tooltips = info.get("output_tooltips") or [None] * len(names)
    outputs = zip(names, tooltips, strict=True)
    texts = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: _socket(name, spec[1].get("tooltip")) for name, spec in given.items()},
        "outputs": {str(place): _socket(*output) for place, output in enumerate(outputs)},
    }
    return {key: text for key, text in texts.items() if text}


def _socket(name: str, tooltip: str | None) -> Texts:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def words(script: str) -> dict[str, str]:
    """Return the English that a script of the web part has for its keys."""
    blocks = "".join(_BLOCK.findall(script))
    found = {key: re.findall(_TEXT, text) for key, text in _WORD.findall(blocks)}
    return {key: "".join(map(json.loads, parts)) for key, parts in found.items()}


def web_texts(folder: Path = SCRIPTS) -> Texts:
    """Return the English of all scripts, in the form of main.json."""
    found: dict[str, str] = {}
    for script in sorted(folder.glob("*.mjs")):
        found |= words(script.read_text(encoding="utf-8"))
    return {SECTION: dict(sorted(found.items()))}


def flat(texts: Texts, above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text with its keys, joined by dots as the front end asks for them."""
    for key, value in texts.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, dict):
            yield from flat(value, name)
        else:
            yield name, value


def load(language: str, file: str) -> Texts:
    """Return a file of a language; nothing where there is none."""
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(language: str, file: str, texts: Texts) -> None:
    """Write a file of a language."""
    path = LOCALES / language / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def languages() -> list[str]:
    """Return the languages that are there."""
    return sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir())


def complaints(language: str) -> Iterator[str]:
    """Yield what a language lacks, and what it has that English has not."""
    for file in (NODES, WORDS):
        source, other = dict(flat(load(SOURCE, file))), dict(flat(load(language, file)))
        yield from (f"{language}/{file} lacks {name}" for name in source if name not in other)
        yield from (
            f"{language}/{file} need not have {name}" for name in other if name not in source
        )


def main() -> int:
    """Write English and say what other languages need; 1 where they need something."""
    parser = argparse.ArgumentParser(description="Write the English of locales/en.")
    parser.add_argument("--comfyui", metavar="PATH", help="the ComfyUI to use")
    try:
        runtime = ensure(parser.parse_args().comfyui)
    except SetupError as error:
        say(str(error))
        return error.code
    # From here on aiohttp is needed, which the ComfyUI's own Python has.
    if Path(sys.executable).absolute() != runtime.python.absolute():
        command = [str(runtime.python), os.path.abspath(__file__), *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    from server import Server

    with (
        tempfile.TemporaryDirectory(prefix="lora2-locales-") as folder,
        Server(runtime, Path(folder)) as server,
    ):
        save(SOURCE, NODES, node_texts(server.get("/object_info")))
    save(SOURCE, WORDS, web_texts())
    found = [line for language in languages() for line in complaints(language)]
    for line in found:
        say(line)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
