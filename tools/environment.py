"""A virtual environment that repairs itself, and the processes that fill it.

Only the standard library is used here.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PYTHON = (3, 11)

_NO_NETWORK = re.compile(
    r"Could not find a version|No matching distribution|NewConnectionError|ConnectionError"
    r"|Max retries exceeded|name resolution|timed out|ProxyError|SSLError|Network is unreachable"
)
# These would send packages, or imports, to another place than the environment.
_MISLEADING = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"}


class SetupError(Exception):
    """A set-up that cannot go on; the message is one sentence that says what to do."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Tell the user something without touching the standard output."""
    print(message, file=sys.stderr, flush=True)


def venv_python(folder: Path) -> Path:
    """Return where a virtual environment keeps its interpreter."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`; what its commands print goes to `log`."""

    folder: Path
    log: Path

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return venv_python(self.folder)

    @property
    def site_packages(self) -> Path:
        """The folder that packages are installed in."""
        if os.name == "nt":
            return self.folder / "Lib" / "site-packages"
        found = sorted((self.folder / "lib").glob("python3*/site-packages"))
        return found[-1] if found else self.folder / "lib"

    def version(self) -> str:
        """Return the Python version that the environment was built with."""
        text = (self.folder / "pyvenv.cfg").read_text(encoding="utf-8")
        found = re.search(r"^version\S* *= *(\S+)", text, re.M)
        return found[1] if found else ""

    def works(self) -> bool:
        """Whether its interpreter runs, is new enough and has pip."""
        code = f"import pip, sys; sys.exit(sys.version_info < {PYTHON})"
        with contextlib.suppress(OSError):
            done = subprocess.run([str(self.python), "-c", code], capture_output=True, check=False)
            return done.returncode == 0
        return False

    def create(self) -> None:
        """Build the environment, in place of what is there."""
        say(f"Creating the virtual environment {self.folder.name} ...")
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder)
        else:
            self.folder.unlink(missing_ok=True)
        # The base interpreter: an environment cannot be rebuilt by one that lies in it.
        base = getattr(sys, "_base_executable", None) or sys.executable
        if self.run([base, "-m", "venv", str(self.folder)]).code != 0:
            raise SetupError(
                f"Python could not create {self.folder} (details: {self.log}). On Debian and "
                "Ubuntu install python3-venv, then run the same command again."
            )

    def broken_packages(self, thorough: bool) -> Iterator[Path]:
        """Yield the metadata folder of each installed package that has lost files.

        The quick look takes each package's first source file, the thorough one all its files.
        """
        for metadata in self.site_packages.glob("*.dist-info"):
            record = metadata / "RECORD"  # pip writes it last
            if not record.is_file() or any(self._lost_files(record, thorough)):
                yield metadata

    def _lost_files(self, record: Path, thorough: bool) -> Iterator[str]:
        """Yield the files that a package's record lists and the disk lacks."""
        with record.open(encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                name = row[0] if row else ""
                if not name or name.endswith(".pyc") or not (thorough or name.endswith(".py")):
                    continue
                if not os.path.lexists(self.site_packages / name):
                    yield name
                if not thorough:
                    return

    def forget_broken_packages(self) -> int:
        """Make pip install broken packages anew, and return how many there are.

        A package without its metadata counts as not installed.
        """
        broken = list(self.broken_packages(thorough=True))
        for metadata in broken:
            say(f"Repairing the package {metadata.name.split('-')[0]} ...")
            shutil.rmtree(metadata)
        return len(broken)

    def pip(self, arguments: list[str], what: str) -> None:
        """Run pip in the environment; a failure becomes one sentence about `what`."""
        done = self.run([str(self.python), "-m", "pip", *arguments])
        if done.code == 0:
            return
        if "No space left" in done.output:
            raise SetupError(
                "The disk is full: LoRA² set-up needs about 7 GB. "
                "Free some and run the same command again."
            )
        if _NO_NETWORK.search(done.output):
            raise SetupError(
                f"LoRA² set-up needs a package registry once: pip could not download {what}. "
                f"Connect and run the same command again (details: {self.log})."
            )
        errors = re.findall(r"^ERROR: (.*)$", done.output, re.M) or ["no reason given"]
        raise SetupError(f"pip could not install {what}: {errors[-1]} (details: {self.log}).")

    def run(self, command: list[str]) -> Finished:
        """Run a command with its output in the log, and show what takes long."""
        variables = {name: value for name, value in os.environ.items() if name not in _MISLEADING}
        variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}
        variables.setdefault("PIP_RETRIES", "2")  # a missing network is told in seconds
        output = []
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=variables,
                text=True,
                encoding="utf-8",
                errors="replace",
                close_fds=False,  # hands down the lock, see `locked`
            ) as process,
        ):
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                output.append(line)
                if re.match(r"\s*(Downloading|Installing|Building) ", line):
                    say("  " + line.strip()[:100])
        return Finished(process.returncode, "".join(output))


@dataclass(frozen=True)
class Finished:
    """The exit code of a command and what it printed."""

    code: int
    output: str


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let one process at a time in; the lock dies with the process.

    The commands that it runs hold the lock too, where the system lets them: a pip that outlives
    a killed set-up must not meet the next one.
    """
    with file.open("a+") as handle:
        if not _try_lock(handle):
            say("Another set-up of this folder is running; waiting for it ...")
            while not _try_lock(handle):
                time.sleep(0.5)
        os.set_inheritable(handle.fileno(), True)
        yield


def _try_lock(handle: IO[str]) -> bool:
    """Take the lock if it is free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
