"""Every path that a user names, resolved through ComfyUI's folders."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path, PureWindowsPath

import folder_paths

from ..files.header import ENDINGS
from .errors import HostError

_LONGEST_NAME, _LONGEST_PATH = 200, 1000  # bytes of a name, characters of all folders and it
# What Windows keeps for its devices, in a folder's name too.
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"}
_RESERVED |= {f"{n}{i}" for n in ("COM", "LPT") for i in "0123456789¹²³"}
_LINKED = (*ENDINGS, "")  # of files that a LoRA's link may lead to


def lora_names() -> list[str]:
    """LoRA files that ComfyUI lists, relative to its loras folders; safetensors only, by any ending
    that they have there. A pickled .pt can run code, and is not offered."""
    try:
        names = folder_paths.get_filename_list("loras")
    except FileNotFoundError:  # a folder that ComfyUI has listed before was deleted
        folder_paths.filename_list_cache.pop("loras", None)
        names = folder_paths.get_filename_list("loras")
    return [name for name in names if _is_safe(name)]


def lora_path(name: str) -> Path:
    """The file of a listed LoRA, found through ComfyUI's loras folders.

    A name stays within these folders: one that is absolute or steps up by ``..`` is refused. Links
    are followed wherever they lead, as ComfyUI does, since many keep their models on another disk
    or in a cache that names files by their content alone. So what a link leads to may bear
    such an ending or none; any other kind of file is refused, and of what is read nothing is shown
    before it proved to be a LoRA. Raises HostError when ``name`` is not in a loras folder.
    """
    if leaves(name):
        raise HostError(
            f"lora_name {_shown(name)} leads out of the loras folders; choose one from the list."
        )
    listed = folder_paths.get_full_path("loras", name)
    if not listed:
        raise HostError(
            f"lora_name {_shown(name)} is not in a loras folder; choose one from the list."
        )
    path = Path(listed)
    if not _is_safe(path.name) or path.resolve().suffix.lower() not in _LINKED:
        raise HostError(
            f"lora_name {_shown(name)} is not a safetensors file, or a link to another kind of "
            "file; choose a .safetensors or .sft LoRA."
        )
    return path


def _is_safe(name: str) -> bool:
    """Whether a file is a safetensors file by its ending."""
    return Path(name).suffix.lower() in ENDINGS


def leaves(name: str) -> bool:
    """Whether a name is more than folders and a file, on any system."""
    plain = name.replace("\\", "/")
    return plain.startswith("/") or PureWindowsPath(name).drive != "" or ".." in plain.split("/")


def lora_fingerprint(name: str) -> str:
    """Changes when the file does, so that ComfyUI reads it again; empty when it is not there."""
    path = folder_paths.get_full_path("loras", name)
    return str(Path(path).stat().st_mtime_ns) if path else ""


def new_lora_path(file_name: str, taken: Collection[Path] = ()) -> Path:
    """A path under output/loras that does not exist yet, from the name a user typed.

    ``file_name`` may hold subfolders and marks like %year%. ``taken``: paths that will exist, of
    trainings under way. Raises HostError for a name that leaves the folder.
    """
    clean = file_name.strip().replace("\\", "/")
    end = next((end for end in ENDINGS if clean.lower().endswith(end)), "")
    clean = clean[: len(clean) - len(end)]
    if leaves(clean) or not _fits_a_disk(clean):
        raise HostError(
            f"file_name is {_shown(file_name)}; it must be a plain name or a subfolder and a name, "
            "such as 'cats/sks_cat', of letters, digits and signs that every system takes, at most "
            "200 bytes each, and stays within output/loras."
        )
    root = Path(folder_paths.get_output_directory()).resolve() / "loras"
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(clean, str(root))
    except OSError as error:
        raise HostError(
            f"file_name is {_shown(file_name)}, whose folder cannot be used ({error.strerror}: "
            f"{Path(error.filename or root).name}); choose another."
        ) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise HostError(  # what newer ComfyUIs raise for a link that leads out of it
            f"file_name is {_shown(file_name)}, whose folder leads out of output/loras; choose "
            "another."
        ) from error
    while (path := Path(folder) / f"{name}_{counter:05}_.safetensors") in taken:
        counter += 1
    return path


def _fits_a_disk(name: str) -> bool:
    """Whether folders and a file may be called so on every system, and look as they are called."""
    # Line breaks, signs that turn the text round, half characters: none of them is printable.
    if not name.isprintable() or any(c in name for c in '<>:"|?*') or len(name) > _LONGEST_PATH:
        return False
    parts = name.split("/")
    # Windows leaves out a dot or a blank at the end: two folders would be one.
    if any(folder != folder.rstrip(". ") for folder in parts[:-1]):
        return False
    return all(
        part.strip(". ") and len(part.encode()) <= _LONGEST_NAME
        and part.split(".")[0].strip().upper() not in _RESERVED
        for part in parts
    )  # fmt: skip


def strip_path(lora: Path) -> Path:
    """Where the pictures go that are painted while ``lora`` is trained."""
    root = Path(folder_paths.get_output_directory()).resolve()
    folder = lora.parent.relative_to(root / "loras")
    return root / "lora2_samples" / folder / f"{lora.stem}.png"


def cache_folder() -> Path:
    """Where encoded photos and texts are kept, to be computed once."""
    return _own_folder() / "cache"


def checkpoint_folder() -> Path:
    """Where unfinished runs are kept, to go on with."""
    return _own_folder() / "checkpoints"


def jobs_folder() -> Path:
    """Where it is noted what trainings there are and were."""
    return _own_folder() / "jobs"


def own_folders() -> tuple[str, ...]:
    """Every folder of ComfyUI that a message may name, the innermost first."""
    known = folder_paths.folder_names_and_paths.values()
    return _every_spelling(
        folder_paths.get_output_directory(),
        folder_paths.get_input_directory(),
        folder_paths.get_temp_directory(),
        folder_paths.get_user_directory(),
        str(Path(folder_paths.get_user_directory()).parent),
        folder_paths.base_path,
        *(str(folder) for folders, *_ in known for folder in folders),
    )


@functools.lru_cache(maxsize=4)
def _every_spelling(*folders: str) -> tuple[str, ...]:
    """``folders`` and where links lead from them; kept, since a screen asks for every line."""
    found = {Path(folder) for folder in folders}
    found |= {folder.resolve() for folder in found}
    texts = {str(folder) for folder in found if len(folder.parts) > 1}
    return tuple(sorted(texts, key=len, reverse=True))


def dataset_folders() -> list[str]:
    """Subfolders of ComfyUI's input folder, for a list to choose from."""
    return sorted(folder_paths.get_input_subfolders())


def dataset_folder(name: str) -> Path:
    """The folder that ``name`` means: below input/, or an absolute path that ComfyUI may read.

    Allowed are the input, output and temp folders and any folder registered under the name
    ``lora2_datasets`` in extra_model_paths.yaml. Raises HostError for anything else.
    """
    root = Path(folder_paths.get_input_directory())
    registered = folder_paths.folder_names_and_paths.get("lora2_datasets", ([], set()))[0]
    outputs = (folder_paths.get_output_directory(), folder_paths.get_temp_directory())
    allowed = [root, *map(Path, outputs), *map(Path, registered)]
    try:
        path = (root / name).resolve()  # an absolute name replaces the root
        there = path.is_dir()
    except (OSError, ValueError, RuntimeError):  # no path at all, too long, links in a circle
        path, there = root, False
    if not any(path.is_relative_to(folder.resolve()) for folder in allowed):
        raise HostError(
            f"folder {_shown(name)} is outside ComfyUI's folders; put the images under input/, or "
            "list their folder as lora2_datasets in extra_model_paths.yaml."
        )
    if not there:
        raise HostError(f"folder {_shown(name)} does not exist under {root}; check the name.")
    return path


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:119] + "…")


def _own_folder() -> Path:
    return Path(folder_paths.get_user_directory()).resolve() / "lora2"
