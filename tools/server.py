"""Boot a real ComfyUI server in a folder of its own, talk to it, and leave nothing behind.

    with Server(runtime, folder) as server:
        history = server.run(workflow, on_progress=print)

To be run by the runtime's own interpreter (`Runtime.python`), which has `aiohttp`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from client import Client, ServerError, WorkflowError, WorkflowInterrupted
from packaged import LINK_NAME, make_link

if TYPE_CHECKING:
    from types import TracebackType

    from comfyui import Runtime

ROOT = Path(os.path.abspath(__file__)).parent.parent
START_SECONDS = 300  # importing torch from a cold disk is slow
STOP_SECONDS = 10
LOG_TAIL_LINES = 30

__all__ = ["Server", "ServerError", "WorkflowError", "WorkflowInterrupted"]

# Runs ComfyUI's main.py as if started by hand, and ends with the parent, however that one ends:
# its standard input is a pipe from the parent, which the system closes.
_LAUNCHER = """
import os, runpy, sys, threading
def follow_parent():
    while os.read(0, 1):
        pass
    os._exit(1)
threading.Thread(target=follow_parent, daemon=True).start()
del sys.argv[0]
if not sys.path[0]:  # what -c puts there
    del sys.path[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server(Client):
    """A ComfyUI server that lives as long as the `with` block, with all its folders in one.

    `directory` gets `input`, `output`, `temp`, `user` and `server.log`. The ComfyUI's own folder
    is not written to: a pack that is not installed in it is shown to it by a configuration file.
    """

    def __init__(
        self,
        runtime: Runtime,
        directory: Path,
        extra_args: Iterable[str] = (),
        *,
        cpu: bool = True,
        root: Path = ROOT,
    ) -> None:
        self.runtime = runtime
        self.directory = directory.absolute()
        self.extra_args = tuple(extra_args)
        self.cpu = cpu
        self.root = root
        super().__init__("")
        self._process: subprocess.Popen[bytes] | None = None

    # --- life ------------------------------------------------------------------------------------

    @property
    def input(self) -> Path:
        """The folder that LoadImage reads."""
        return self.directory / "input"

    @property
    def output(self) -> Path:
        """The folder that SaveImage writes to; LoRAs come in its `loras`."""
        return self.directory / "output"

    @property
    def log(self) -> Path:
        """What the server printed."""
        return self.directory / "server.log"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return once it answers."""
        for name in ("input", "output", "temp", "user"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            )
        atexit.register(self.stop)
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, by force if it does not go; calling it again does nothing."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            if process.stdin:
                process.stdin.close()

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        """Return all that the server printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _command(self, port: int) -> list[str]:
        """Return the command line, with only the options that this ComfyUI knows."""
        comfyui = self.runtime.path
        options = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        options += ["--cpu"] if self.cpu else []
        for name in ("input", "output", "temp", "user"):
            options += [f"--{name}-directory", str(self.directory / name)]
        folder_name = _pack_folder(comfyui, self.root)
        if folder_name is None:
            folder_name = LINK_NAME
            options += ["--extra-model-paths-config", str(self._show_pack())]
        known = (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        if '"--disable-api-nodes"' in known:
            options.append("--disable-api-nodes")
        if '"--database-url"' in known:
            options += ["--database-url", f"sqlite:///{(self.directory / 'comfyui.db').as_posix()}"]
        if not self.runtime.packaged and '"--whitelist-custom-nodes"' in known:
            # A user's other packs may write or install things when they start.
            options += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", folder_name]
        program = [str(self.runtime.python), "-c", _LAUNCHER, str(comfyui / "main.py")]
        return [*program, *options, *self.extra_args]

    def _show_pack(self) -> Path:
        """Write the configuration that shows the pack to a ComfyUI it is not installed in."""
        folder = self.directory / "custom_nodes"
        if not (folder / LINK_NAME).exists():
            make_link(folder / LINK_NAME, self.root)
        config = self.directory / "extra_model_paths.yaml"
        # JSON is YAML, and quotes any path right.
        config.write_text(json.dumps({"lora2": {"custom_nodes": str(folder)}}), encoding="utf-8")
        return config

    def _await_answer(self) -> None:
        """Wait until the server answers, or say why it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive("did not start")
            with contextlib.suppress(ServerError):
                self.get("/system_stats")
                return
            time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s.\n{self._log_tail()}")

    def check_alive(self, trouble: str) -> None:
        """Raise with the end of the log if the process is gone."""
        if not self.alive():
            code = "" if self._process is None else f" (exit code {self._process.poll()})"
            raise ServerError(f"ComfyUI {trouble}{code}; its log ends:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])


def _free_port() -> int:
    """Return a port that is free on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _pack_folder(comfyui: Path, root: Path) -> str | None:
    """Return the pack's name in this ComfyUI's custom_nodes, if it is installed or linked there."""
    folder = comfyui / "custom_nodes"
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and entry.resolve() == root.resolve():
            return entry.name
    return None
