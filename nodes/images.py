"""Load images from a folder, with captions."""

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host
from ..lora2_core.data.folder import load_folder, watched_files
from ..lora2_core.files.header import one_line
from .common import CATEGORY, advanced, also_called

_PHOTOS = Path(__file__).parent.parent / "photos"
_EXAMPLE_MARK = "example: "


def _folder() -> io.Combo.Input:
    return io.Combo.Input(
        "folder",
        options=_choices(),
        tooltip=(
            "A folder below ComfyUI's input folder, or an example that comes with the "
            "pack. Copy your photos to input/my_subject and press R to see it here."
        ),
    )


class LoRA2ImageFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2ImageFolder",
            **also_called("dataset", "load image batch", "training images"),
            display_name="Load images from a folder",
            category=CATEGORY,
            description=(
                "All images of a folder, each at its own size, and their captions: the text file "
                "of the image's name (cat.png, cat.txt), metadata.jsonl or kohya's JSON, empty "
                "where there is none. Folders in it called like 5_cat are kohya's repeats. "
                "The node tells what it leaves out."
            ),
            inputs=[
                _folder(),
                advanced(
                    io.String.Input(
                        "path",
                        default="",
                        optional=True,
                        tooltip=(
                            "Instead of the list: an absolute path, or one below input/. ComfyUI's "
                            "own folders are allowed, and those listed as lora2_datasets in "
                            "extra_model_paths.yaml."
                        ),
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip=(
                        "One image per file, in the order of the file names; those with repeats so "
                        "many times."
                    ),
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="One caption per image; empty captions fall back to the prompt.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="What is opaque in each image; ones where it has no transparency.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, path: str = "") -> str:
        """Changes when a file of the folder does, so that ComfyUI reads it again."""
        try:
            root = _resolve(folder, path)
            files = watched_files(root)
            return repr([(str(file.relative_to(root)), _changed(file)) for file in files])
        except (OSError, ValueError):
            return ""  # execute says what is wrong

    @classmethod
    def execute(cls, folder: str, path: str = "") -> io.NodeOutput:
        found = load_folder(_resolve(folder, path))
        for note in found.notes:
            logging.warning("LoRA²: %s", one_line(note))
        # With what comes out, so that it is in the history, too, and an empty one takes away what
        # the node said before.
        return io.NodeOutput(*found.lists(), ui=ui.PreviewText("\n".join(found.notes)))


def _changed(file: Path) -> int:
    """When, in ns; 0 where a link leads nowhere."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _choices() -> list[str]:
    examples = sorted(p.name for p in _PHOTOS.iterdir() if p.is_dir())
    return [_EXAMPLE_MARK + name for name in examples] + comfy_host.dataset_folders()


def _resolve(folder: str, path: str) -> Path:
    if not path.strip() and folder.startswith(_EXAMPLE_MARK) and folder in _choices():
        return _PHOTOS / folder.removeprefix(_EXAMPLE_MARK)
    return comfy_host.dataset_folder(path.strip() or folder)
