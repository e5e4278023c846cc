"""The pack as a package that can be imported, whatever its folder is called.

Files that have to find this one by its path ask for it so::

    runpy.run_path(str(ROOT / "tools" / "pack.py"))["register"]()
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def register(name: str = "lora2_pack", folder: Path = ROOT) -> None:
    """Make ``name`` a package whose modules lie in ``folder``, without running its ``__init__.py``.

    The folder leaves ``sys.path``, where Python puts the current one: the pack's ``nodes/`` would
    hide ComfyUI's ``nodes.py``, and its ``tools/server.py`` ComfyUI's ``server.py``.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    package = ModuleType(name)
    package.__spec__ = spec
    package.__path__ = [str(folder)]
    sys.modules[name] = package
