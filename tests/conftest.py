"""Let the tests use a real ComfyUI in this process, and a booted server.

The pack is importable as `lora2_pack` and the tools as `lora2_tools`. The pack's own folder is
kept off `sys.path`: its `nodes/` would hide ComfyUI's `nodes.py`, its `tools/server.py`
ComfyUI's `server.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

# On a developer's machine every run looks at new examples; CI must not fail by chance.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def _load_tools() -> None:
    """Import the tools, which find each other in their own folder, as `lora2_tools`."""
    sys.path.insert(0, str(TOOLS))
    try:
        for name in ("environment", "packaged", "comfyui", "checkouts", "client", "demo", "matrix"):
            sys.modules[f"lora2_tools.{name}"] = importlib.import_module(name)
            setattr(sys.modules["lora2_tools"], name, sys.modules[name])
        # Never under its bare name, which is ComfyUI's.
        importlib.import_module("lora2_tools.server")
    finally:
        sys.path.remove(str(TOOLS))


_register = runpy.run_path(str(TOOLS / "pack.py"))["register"]
_register("lora2_pack", ROOT)
_register("lora2_tools", TOOLS)
_load_tools()


def _find_runtime() -> Any:
    """Return the ComfyUI in use, or stop with the reason why there is none."""
    from lora2_tools.comfyui import RUNTIME_MODULES, ensure
    from lora2_tools.environment import SetupError

    try:
        runtime = ensure(os.environ.get("LORA2_COMFYUI"))
    except SetupError as error:
        raise pytest.UsageError(str(error)) from None
    missing = [name for name in RUNTIME_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(
            f"{sys.executable} lacks {', '.join(missing)}. Run: python3 tools/test.py"
        )
    # The booted server runs in what the tests run in, not in an environment that lies beside it.
    return dataclasses.replace(runtime, python=Path(sys.executable))


def _enter_comfyui(comfyui: Path, directory: Path) -> None:
    """Make ComfyUI importable here, on the CPU and with folders of its own."""
    sys.path.insert(0, str(comfyui))
    options: Any = importlib.import_module("comfy.options")
    options.enable_args_parsing(False)  # the arguments are pytest's
    arguments: Any = importlib.import_module("comfy.cli_args").args
    arguments.cpu = True  # read once, by comfy.model_management
    # nodes.py puts comfy/ on the path, whose utils.py would then hide the package of this name.
    importlib.import_module("utils.extra_config")
    folder_paths: Any = importlib.import_module("folder_paths")
    for name in ("input", "output", "temp", "user"):
        (directory / name).mkdir()
        getattr(folder_paths, f"set_{name}_directory")(str(directory / name))
    # As main.py does: what a node saves as a LoRA is offered to the loaders.
    folder_paths.add_model_folder_path("loras", str(directory / "output" / "loras"))


_STATE = pytest.StashKey[tuple[Any, Path]]()


class _PackIsNoTestPackage:
    """Keep pytest from importing the pack's own `__init__.py`, as it would a test package's."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> Any:
        """Take the repository's folder for a plain one."""
        return pytest.Dir.from_parent(parent, path=path) if path.resolve() == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    """Enter ComfyUI before any test module is imported, so that these may import comfy."""
    config.pluginmanager.register(_PackIsNoTestPackage())
    runtime = _find_runtime()
    directory = Path(tempfile.mkdtemp(prefix="lora2-tests-"))
    config.stash[_STATE] = (runtime, directory)
    _enter_comfyui(runtime.path, directory)


# Tests of one booted server run in one process, one after the other, and begin first.
_SERVERS = ("server", "studio")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests belong into one process, where several processes share them."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        used = [name for name in _SERVERS if name in getattr(item, "fixturenames", ())]
        group = used[0] if used else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in _SERVERS)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folders that ComfyUI used in this process."""
    if _STATE in config.stash:
        shutil.rmtree(config.stash[_STATE][1], ignore_errors=True)


@pytest.fixture(scope="session")
def runtime(pytestconfig: pytest.Config) -> Any:
    """The ComfyUI in use: `.path`, `.python`, `.packaged`."""
    return pytestconfig.stash[_STATE][0]


@pytest.fixture(scope="session")
def comfyui(runtime: Any) -> Path:
    """The folder of the ComfyUI that this process can import."""
    return runtime.path


@pytest.fixture(scope="session")
def comfy_directory(pytestconfig: pytest.Config) -> Path:
    """The folder with the `input`, `output`, `temp` and `user` of ComfyUI in this process."""
    return pytestconfig.stash[_STATE][1]


@pytest.fixture(scope="session")
def server(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A booted ComfyUI server with the pack, shared by all tests of the session."""
    from lora2_tools.server import Server

    with Server(runtime, tmp_path_factory.mktemp("server")) as booted:
        yield booted
