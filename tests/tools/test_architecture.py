"""The rules of the house, read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_FILES = 15  # of a package, its __init__.py among them

# The rooms of lora2_core from the ground up: each may import from those below it, never from its
# neighbours on the same floor. nodes/ stands above all of them.
FLOORS = (
    {"adaptive_rank"},
    {"config"},
    {"files"},
    {"adapters", "data", "resizing"},
    {"training", "reports", "lora_file"},
    {"jobs", "comfy_host", "tiny_sdxl"},
    {"cli"},
    {"__main__"},
)

SEAM = "lora2_core/comfy_host/"
ROUTES = "nodes/screen/routes.py"
# What ComfyUI offers beside its node interface, comfy_api, which every node may use.
COMFYUI_MODULES = {
    "api_server",
    "app",
    "comfy",
    "comfy_execution",
    "comfy_extras",
    "cuda_malloc",
    "execution",
    "folder_paths",
    "latent_preview",
    "main",
    "middleware",
    "node_helpers",
    "nodes",
    "protocol",
    "server",
    "utils",
}
DANGEROUS_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "pip", "shelve", "subprocess"}
DANGEROUS_CALLS = {"__import__", "compile", "eval", "exec"}
DANGEROUS_ATTRIBUTES = {("os", "popen"), ("os", "system"), ("torch", "load")}

# Put together here, so that this file does not hold them.
REGISTRY_HOSTS = re.compile("py" + r"pi\.org|python" + r"hosted\.|npm" + r"js\.(org|com)")
UNFINISHED = re.compile(r"\b(TO" + "DO|FIX" + "ME)\b")
TEXT_SUFFIXES = {
    "",
    ".css",
    ".html",
    ".js",
    ".json",
    ".md",
    ".mjs",
    ".py",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
NOT_OURS = {
    ".comfyui",
    ".environments",
    ".git",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
    ".venv",
    "__pycache__",
    "demo-out",
    "out",
    "vendor",
}


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    """Return the source files of some folders, relative to the repository."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not NOT_OURS & set(path.relative_to(ROOT).parts)
    )


CORE = files("lora2_core")
PACK = ["__init__.py", *CORE, *files("nodes")]
PYTHON = [*PACK, *files("tools")]
# What a bare machine runs; packages below tools/ may need what they name in their requirements.
COMMANDS = [file for file in files("tools") if Path(file).parent == Path("tools")]
SCRIPTS = files("web", suffixes=(".js", ".mjs"))
EVERYTHING = [*PYTHON, *files("bench", "tests")]


def read(file: str) -> str:
    """Return the text of a file."""
    return (ROOT / file).read_text(encoding="utf-8")


def tree(file: str) -> ast.Module:
    """Return the syntax tree of a Python file."""
    return ast.parse(read(file), file)


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the level and the module of every import; level 0 is absolute."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((0, alias.name) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            base = found.module or ""
            if found.level and not base:
                yield from ((found.level, alias.name) for alias in found.names)
            else:
                yield found.level, base


def absolute(file: str) -> set[str]:
    """Return the first names of the modules that a file imports absolutely."""
    return {name.split(".")[0] for level, name in imports(tree(file)) if level == 0}


def test_the_house_has_its_rooms() -> None:
    """The other tests look at something."""
    assert any(file.startswith(SEAM) for file in CORE)
    assert len(PACK) > len(CORE) + 1
    assert "tools/comfyui.py" in PYTHON
    assert SCRIPTS


@pytest.mark.parametrize("file", PACK)
def test_only_the_seam_knows_comfyui(file: str) -> None:
    seam = file.startswith(SEAM)
    allowed = COMFYUI_MODULES - {"server"} if seam else {"server"} if file == ROUTES else set()
    assert absolute(file) & COMFYUI_MODULES <= allowed
    if file in CORE and not seam:
        assert "comfy_api" not in absolute(file)


@pytest.mark.parametrize("file", PACK)
def test_the_pack_finds_itself_by_relative_imports(file: str) -> None:
    # Under whatever name ComfyUI imports it.
    assert not absolute(file) & {"lora2_core", "lora2_pack", "tools"}


# --- rooms ----------------------------------------------------------------------------------------


def arrows(file: str, text: str | None = None) -> Iterator[tuple[str, int]]:
    """Yield each file of the pack that `file` imports from, wherever in it, and the line.

    `text`: what to read in place of the file. Imports for types alone count as any other.
    """
    folder = Path(file).parent.parts
    for node in ast.walk(tree(file) if text is None else ast.parse(text, file)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder[: len(folder) - node.level + 1] + tuple((node.module or "").split("."))
        for alias in node.names:
            for parts in ((*base, alias.name), base):
                path = "/".join(filter(None, parts))
                found = {f"{path}.py", f"{path}/__init__.py"} & set(PACK)
                if found:
                    yield found.pop(), node.lineno
                    break


def room_of(file: str) -> str:
    """Return the package, or the module beside the packages, of lora2_core that a file is in."""
    return Path(file).parts[1].removesuffix(".py")


def upward(file: str, text: str | None = None) -> list[str]:
    """Return the imports of a file of the core that do not lead downwards, as texts."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    own = room_of(file)
    return [
        f"{file}:{line} imports {target}"
        for target, line in arrows(file, text)
        if target not in CORE or (room_of(target) != own and floor[room_of(target)] >= floor[own])
    ]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return what is left of a graph when all that is on no way from circle to circle is off."""
    left = {name: set(targets) - {name} for name, targets in graph.items()}
    while True:
        reached = set().union(*left.values())
        ends = [name for name in left if name not in reached or not left[name] & left.keys()]
        if not ends:
            return sorted(left)
        for name in ends:
            del left[name]


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(file) for file in CORE} - {"__init__"}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("file", [file for file in CORE if room_of(file) != "__init__"])
def test_imports_lead_downwards(file: str) -> None:
    assert upward(file) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("lora2_core/files/read.py", "from ..training.trainer import Trainer"),  # upwards
        ("lora2_core/training/ema.py", "from ..reports import canvas"),  # sideways
        ("lora2_core/jobs/job.py", "from .. import comfy_host"),
        ("lora2_core/data/photos.py", "def f():\n    from ..training.ema import AveragedWeights"),
        ("lora2_core/config/train.py", "if TYPE_CHECKING:\n    from ..cli import main"),
        ("lora2_core/cli.py", "from ..nodes import train"),
    ],
)
def test_an_import_that_is_turned_round_is_found(file: str, line: str) -> None:
    assert upward(file, line) and not upward(file)


def test_nothing_goes_in_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    graph = {file: {target for target, _ in arrows(file)} for file in PACK}
    assert circles(graph) == []


def test_packages_go_in_no_circle_either() -> None:
    def package(file: str) -> str:
        return f"lora2_core/{room_of(file)}" if file in CORE else str(Path(file).parent)

    graph: dict[str, set[str]] = {package(file): set() for file in PACK}
    for file in PACK:
        graph[package(file)] |= {package(target) for target, _ in arrows(file)}
    assert circles(graph) == []


def packages() -> dict[str, list[str]]:
    """Return the modules of every folder that holds some, tests aside."""
    found: dict[str, list[str]] = {}
    for file in [*PACK, *files("tools", "bench")]:
        found.setdefault(str(Path(file).parent), []).append(Path(file).stem)
    return found


@pytest.mark.parametrize(("package", "modules"), packages().items())
def test_packages_are_small_and_say_their_name_once(package: str, modules: list[str]) -> None:
    assert len(modules) <= MAX_FILES
    name = Path(package).name
    assert [module for module in modules if name and module.startswith(name)] == []


def test_the_tests_of_the_core_stand_in_the_same_rooms() -> None:
    rooms = {room_of(file) for file in CORE if len(Path(file).parts) > 2}
    beside = {path.name for path in (ROOT / "tests" / "core").iterdir() if path.is_dir()}
    elsewhere = {"comfy_host", "tiny_sdxl"}  # tests/host: they need ComfyUI
    assert beside - {"__pycache__"} == rooms - elsewhere


# --- what nobody may do ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", PACK)
def test_the_pack_runs_no_foreign_code(file: str) -> None:
    assert not absolute(file) & DANGEROUS_MODULES
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in DANGEROUS_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            assert pair not in DANGEROUS_ATTRIBUTES, f"line {node.lineno}"


@pytest.mark.parametrize("file", COMMANDS)
def test_tools_start_with_the_standard_library_alone(file: str) -> None:
    # Only what runs at import: the rest may need what the set-up installs.
    modules = {Path(name).stem for name in COMMANDS} | set(sys.stdlib_module_names)
    top = [node for node in tree(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    needed = {name.split(".")[0] for node in top for _, name in imports(node)}
    assert needed <= modules


@pytest.mark.parametrize("name", ["comfyui", "environment", "packaged", "test"])
def test_the_setup_needs_the_standard_library_alone(name: str) -> None:
    modules = {Path(file).stem for file in COMMANDS} | set(sys.stdlib_module_names)
    assert absolute(f"tools/{name}.py") <= modules


@pytest.mark.parametrize("file", [*EVERYTHING, *SCRIPTS])
def test_files_are_short(file: str) -> None:
    assert len(read(file).splitlines()) < MAX_FILE_LINES


@pytest.mark.parametrize("file", EVERYTHING)
def test_functions_are_short(file: str) -> None:
    long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in long.items() if lines >= MAX_FUNCTION_LINES} == {}


def script_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line of every function of a script.

    A function's body is a brace after `=>`, or after a parenthesis that no `if` or loop opened.
    """
    # Strings, regular expressions and comments become blanks, so that braces in them do not count.
    blank = re.compile(
        r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`"""
        r"""|(?<=[=(,:;!&|?])\s*/(?![/*])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/""",
        re.S,
    )
    text = blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    opened: list[tuple[bool, int]] = []
    parentheses: list[str] = []
    before_body = ""
    for place, character in enumerate(text):
        if character == "(":
            parentheses.append(text[max(0, place - 20) : place])
        elif character == ")" and parentheses:
            before_body = parentheses.pop()
        elif character == "{":
            lead = text[:place].rstrip()
            control = re.search(r"\b(if|for|while|switch|catch|with)(\s+await)?\s*$", before_body)
            body = lead.endswith("=>") or (lead.endswith(")") and not control)
            opened.append((body, text.count("\n", 0, place)))
        elif character == "}" and opened:
            body, line = opened.pop()
            if body:
                yield line + 1, text.count("\n", 0, place) + 1


def test_functions_of_a_script_are_found() -> None:
    text = "function a(b = {}) {\n if (b) {\n }\n}\nx.f('{', () => {\n}, /[{]/);\nc(d) {\n\n}\n"
    assert sorted(script_functions(text)) == [(1, 4), (5, 6), (7, 9)]


@pytest.mark.parametrize("file", SCRIPTS)
def test_functions_of_scripts_are_short(file: str) -> None:
    long = [
        (first, last)
        for first, last in script_functions(read(file))
        if last - first + 1 >= MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize("file", files(".", suffixes=tuple(sorted(TEXT_SUFFIXES))))
def test_texts_name_no_registry_and_leave_nothing_open(file: str) -> None:
    text = read(file)
    assert not REGISTRY_HOSTS.search(text)
    assert not UNFINISHED.search(text)
