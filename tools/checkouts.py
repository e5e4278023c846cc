"""Which ComfyUI the tests run in, and an environment of its own for one that is not the packaged.

Such an environment lies in `.environments/`, stands on the packaged ComfyUI's `.venv/`, and adds
what this ComfyUI's requirements ask for beyond it, its front end first of all; so it costs
megabytes, not another torch. Nothing is written in the checkout, nor in the environments it has.
Only the standard library is used here.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import packaged
from comfyui import ROOT, Runtime, find
from environment import Environment, SetupError, locked, say

FOLDER = ".environments"
FRONTEND = "comfyui-frontend-package"
STAMP = "lora2-filled"
# Site-packages of an environment, and below it in the order of imports, of the one it stands on.
BENEATH = "lora2-beneath.pth"
_TORCH = ("torch==", "torchvision==", "torchaudio==")


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI in a folder, with its own front end or another version of it.

    Raises `SetupError` for a front end that is no version, and where requirements.txt is missing.
    """

    path: Path
    frontend: str | None = None

    def __post_init__(self) -> None:
        if self.frontend is not None and not re.fullmatch(r"\d+(\.\w+)+", self.frontend):
            raise SetupError(
                f"{self.frontend} is no version of a front end; give one like 1.58.1.", code=2
            )
        if not (self.path / "requirements.txt").is_file():
            raise SetupError(
                f"{self.path} has no requirements.txt, so nothing says what this ComfyUI needs. "
                "Name the whole folder of a release.",
                code=2,
            )

    @property
    def version(self) -> str:
        """ComfyUI's version, or the folder's name if it does not say one."""
        try:
            text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            text = ""
        found = re.search(r"""__version__ *= *["'](.+?)["']""", text)
        return found[1] if found else self.path.name

    def requirements(self) -> str:
        """Return what requirements.txt asks for, with the front end that was wished."""
        text = (self.path / "requirements.txt").read_text(encoding="utf-8")
        if self.frontend is None:
            return text
        kept = [line for line in text.splitlines() if not re.match(rf"{FRONTEND}\b", line.strip())]
        return "\n".join([f"{FRONTEND}=={self.frontend}", *kept, ""])


def runtime_for(named: str | None, frontend: str | None = None, root: Path = ROOT) -> Runtime:
    """Return a ComfyUI with an interpreter that has all that it and the tests need.

    `named` is the folder of a ComfyUI; without it, what `comfyui.find` finds is used. Raises
    `SetupError`, whose message is one sentence for the user.
    """
    path = find(named, root)
    layout = packaged.Layout(root)
    base = packaged.set_up(layout, dev=True)
    if path is None and frontend is None:
        return Runtime(layout.comfyui, base, True)
    checkout = Checkout(path or layout.comfyui, frontend)
    return Runtime(checkout.path, _ready(layout, checkout).python, path is None)


def installed_frontend(runtime: Runtime) -> str:
    """Return the version of the front end that a server of this runtime shows."""
    code = f"import importlib.metadata as m; print(m.version({FRONTEND!r}))"
    command = [str(runtime.python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def bytecode(runtime: Runtime) -> Path:
    """Return where Python keeps what it compiled of a ComfyUI that must not be written to."""
    return runtime.python.parent.parent / "bytecode"


def _ready(layout: packaged.Layout, checkout: Checkout) -> Environment:
    """Return the checkout's environment, built or repaired where that is needed."""
    wanted = _fingerprint(layout, checkout)
    parts = [checkout.version, *([checkout.frontend] if checkout.frontend else []), wanted[:8]]
    folder = layout.root / FOLDER / "-".join(parts)
    environment = Environment(folder, folder.with_name(f"{folder.name}.log"))
    if not _filled(environment, wanted):
        try:
            folder.parent.mkdir(exist_ok=True)
            with locked(layout.root / ".comfyui-setup.lock"):
                if not _filled(environment, wanted):
                    _fill(layout, checkout, environment, wanted)
        except OSError as error:
            raise SetupError(
                f"{folder} could not be written: {error}. "
                "Put that right and run the same command again."
            ) from error
    return environment


def _fingerprint(layout: packaged.Layout, checkout: Checkout) -> str:
    """Return a hash of everything that decides what the environment holds."""
    below = layout.stamp.read_text(encoding="utf-8")
    parts = [checkout.requirements(), below, str(layout.environment.site_packages)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _filled(environment: Environment, wanted: str) -> bool:
    """Whether the environment is whole, as far as a quick look tells."""
    try:
        stamp = (environment.folder / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    below = environment.site_packages / BENEATH
    whole = stamp == wanted and environment.python.exists() and below.is_file()
    return whole and not any(environment.broken_packages(thorough=False))


def _fill(
    layout: packaged.Layout, checkout: Checkout, environment: Environment, wanted: str
) -> None:
    """Install what the packaged ComfyUI's environment lacks, and write the stamp last."""
    environment.log.write_text("", encoding="utf-8")
    (environment.folder / STAMP).unlink(missing_ok=True)
    if not environment.works():
        environment.create()
    environment.forget_broken_packages()
    below = environment.site_packages / BENEATH
    below.write_text(f"{layout.environment.site_packages}\n", encoding="utf-8")
    requirements, pins = (environment.folder / f"{name}.txt" for name in ("requirements", "pins"))
    requirements.write_text(checkout.requirements(), encoding="utf-8")
    torch = [pin for pin in layout.pins if pin.startswith(_TORCH)]
    pins.write_text("\n".join([*torch, ""]), encoding="utf-8")
    say(f"Installing what ComfyUI {checkout.version} needs in {FOLDER}/{environment.folder.name} …")
    environment.pip(
        ["install", "-r", str(requirements), "-c", str(pins)],
        f"the packages of ComfyUI {checkout.version}",
    )
    (environment.folder / STAMP).write_text(wanted, encoding="utf-8")
