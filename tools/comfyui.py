#!/usr/bin/env python3
"""Find the ComfyUI to use, or set one up, and print its path.

Only the standard library is used here: this file runs before anything is installed.

The order is: ``--comfyui PATH``, the environment's ``COMFYUI_PATH``, the ComfyUI whose
``custom_nodes`` the pack lies in, and last a packaged one, which `packaged.py` keeps in
``.comfyui/`` with its packages in ``.venv/``.

    python3 tools/comfyui.py [--comfyui PATH] [--dev]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import packaged
from environment import PYTHON, SetupError, say, venv_python

# abspath, not resolve: reached through a link in custom_nodes, the pack lies in that ComfyUI.
ROOT = Path(os.path.abspath(__file__)).parent.parent

# What ComfyUI cannot run without, and what the developer's tools are imported as.
RUNTIME_MODULES = ("torch", "aiohttp", "safetensors", "transformers")
DEV_MODULES = ("pytest", "pytest_timeout", "hypothesis", "ruff", "basedpyright")


@dataclass(frozen=True)
class Runtime:
    """A ComfyUI and the interpreter that runs it."""

    path: Path
    python: Path
    packaged: bool


def is_comfyui(path: Path) -> bool:
    """Whether `path` is the folder of a ComfyUI."""
    return (path / "main.py").is_file() and (path / "comfy" / "sd.py").is_file()


def find(named: str | None, root: Path = ROOT) -> Path | None:
    """Return the ComfyUI to use, or None for the packaged one."""
    for source, value in (("--comfyui", named), ("COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if not value:
            continue
        path = Path(value).expanduser().absolute()
        # The packaged one may be named before it exists: setting it up is our job, not an error.
        if packaged.Layout(root).owns(path):
            return None
        if not is_comfyui(path):
            raise SetupError(
                f"{source}: {path} is not a ComfyUI (it has no main.py and comfy/sd.py). "
                "Name the folder that holds ComfyUI's main.py.",
                code=2,
            )
        return path
    return host(root)


def host(root: Path) -> Path | None:
    """Return the user's ComfyUI that the pack at `root` is installed in, if it is in one."""
    for place in dict.fromkeys((root, root.resolve())):
        comfyui = place.parent.parent
        inside = place.parent.name == "custom_nodes" and is_comfyui(comfyui)
        if inside and not packaged.Layout(root).owns(comfyui):
            return comfyui
    return None


def interpreters(comfyui: Path) -> Iterator[Path]:
    """Yield the interpreters that a ComfyUI at `comfyui` may run in, likeliest first."""
    for environment in (comfyui / ".venv", comfyui / "venv"):
        yield venv_python(environment)
    yield comfyui.parent / "python_embeded" / "python.exe"  # the spelling of ComfyUI's portable
    yield Path(sys.executable)


def missing_modules(python: Path, modules: tuple[str, ...]) -> list[str]:
    """Return which of `modules` the interpreter cannot find; all of them if it does not run."""
    code = (
        "import importlib.util as u, sys\n"
        "print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    )
    try:
        # In a neutral folder: one in the current directory must not answer for a module.
        done = subprocess.run(
            [str(python), "-c", code, *modules],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=python.parent,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return list(modules)
    return list(modules) if done.returncode else done.stdout.split()


def ensure(comfyui: str | None = None, *, dev: bool = False, root: Path = ROOT) -> Runtime:
    """Return a ComfyUI that can run, setting up whatever is missing; `dev` adds the test tools.

    Raises `SetupError`, whose message is one sentence for the user.
    """
    if sys.version_info < PYTHON:
        raise SetupError(
            f"LoRA² needs Python {PYTHON[0]}.{PYTHON[1]} or newer and this is "
            f"{sys.version.split()[0]}. Run the same command with a newer python3.",
        )
    path = find(comfyui, root)
    layout = packaged.Layout(root)
    if path is None:
        return Runtime(layout.comfyui, packaged.set_up(layout, dev=dev), True)
    for python in interpreters(path):
        if not missing_modules(python, RUNTIME_MODULES):
            if dev:
                _need_dev_tools(layout, python)
            return Runtime(path, python, False)
    return Runtime(path, packaged.set_up(layout, dev=dev, foreign=path), False)


def _need_dev_tools(layout: packaged.Layout, python: Path) -> None:
    """Say how to get the test tools when they are missing: the user's environment is theirs."""
    lacking = missing_modules(python, DEV_MODULES)
    if lacking:
        raise SetupError(
            f"{python} lacks {', '.join(lacking)}, which the tests need. Run: "
            f'"{python}" -m pip install -r "{layout.root / "requirements-dev.txt"}"'
        )


def main(arguments: list[str] | None = None) -> int:
    """Print the path of the ComfyUI in use, and nothing else, on the standard output."""
    parser = argparse.ArgumentParser(description="Find or set up the ComfyUI that LoRA² runs in.")
    parser.add_argument("--comfyui", metavar="PATH", help="the folder of a ComfyUI to use")
    parser.add_argument("--dev", action="store_true", help="also install the test tools")
    options = parser.parse_args(arguments)
    try:
        runtime = ensure(options.comfyui, dev=options.dev)
    except SetupError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on from here.")
        return 130
    print(runtime.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
