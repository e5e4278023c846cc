"""Train LoRA² on images."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..lora2_core import comfy_host, estimate, lora_file, memory_advice, report
from ..lora2_core.config import TrainConfig
from ..lora2_core.dataset import Photo, check_photos
from ..lora2_core.jobs import TrainedLoRA, TrainingJob
from ..lora2_core.presets import AS_SET, build_config, replaced
from . import routes, train_widgets
from .common import CATEGORY, LoRA2Socket, advanced, to_image

_POLL_SECONDS = 0.1
# Widgets that are no settings of the run itself.
_OF_THE_NODE = ("model", "clip", "vae", "instance_prompt", "file_name", "preset", "options")


class LoRA2Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2Train",
            display_name="Train LoRA² on images",
            category=CATEGORY,
            description=(
                "Trains a LoRA on a handful of photos while every layer learns its own rank. The "
                "file goes to output/loras and works in any LoRA loader."
            ),
            is_input_list=True,  # images of different sizes arrive as a list
            is_output_node=True,
            inputs=[
                *train_widgets.sockets(),
                *train_widgets.settings(),
                *map(advanced, train_widgets.advanced_settings()),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP, ready for your prompts."),
                LoRA2Socket.Output(display_name="LORA2", tooltip="For Inspect Ranks."),
                io.String.Output(display_name="path", tooltip="Where the file was written."),
                io.Image.Output(display_name="report", tooltip="Loss, mean rank and rank map."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        pictures = {name: lists.pop(name, None) for name in ("images", "captions", "masks")}
        class_images = lists.pop("class_images", None)
        one = {name: values[0] for name, values in lists.items()}
        settings = {name: value for name, value in one.items() if name not in _OF_THE_NODE}
        preset = one.get("preset", AS_SET)
        config = build_config(settings, preset, one.get("options"))
        photos = check_photos(
            pictures["images"],
            pictures["captions"],
            one["instance_prompt"],
            pictures["masks"],
            config.data.trigger,
        )
        path = comfy_host.new_lora_path(one["file_name"])
        notes = _Notes(cls.hidden.unique_id)
        if changes := replaced(settings, preset):
            notes.say(f"The preset {preset} sets {changes}.")
        setup = comfy_host.prepare_training(
            *(one[name] for name in ("model", "clip", "vae")),
            photos,
            config,
            _class_photos(class_images, config),
            comfy_host.cache_folder(),
        )
        lora_file.check_writable(path, setup.network.expected_bytes())
        for line in _about_run(setup):
            notes.say(line)
        job = _job(setup, path, photos)
        del setup  # the job alone holds the private copy, and lets go of it at its end
        trained = _wait_for(job, notes)
        return _outputs(cls, one["model"], one["clip"], trained)


def _class_photos(images: list[torch.Tensor] | None, config: TrainConfig) -> Sequence[Photo]:
    if not images:
        return ()
    if not config.data.class_prompt.strip():
        raise ValueError(
            "class_images is connected, but class_prompt is empty; write what those images show in "
            "a LoRA² data options node, or disconnect them."
        )
    return check_photos(images, None, config.data.class_prompt)


def _about_run(setup: comfy_host.TrainingSetup) -> Iterator[str]:
    """What the run will take, and what to do where that is more than there is."""
    expected = setup.estimate
    if expected is None:
        return
    yield f"This run takes {expected.text()}."
    needed = expected.learning + expected.activations  # the model is there by now
    free = comfy_host.free_memory()
    if needed > free:
        ways = memory_advice.suggestions(setup.config, needed, free)
        text = f"That may be too much: {estimate.size(free)} are free for {estimate.size(needed)}."
        help_ = f" What would help: {'; or '.join(way.text for way in ways)}." if ways else ""
        yield text + help_


class _Notes:
    """What a person should know of a run, in the log and in the node."""

    def __init__(self, node_id: str):
        self.node_id = node_id
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """One more line, for both."""
        logging.info("LoRA²: %s", line)
        self.show(line)

    def show(self, line: str) -> None:
        """One that the log has by now; nothing where it is empty or there already."""
        if line and line not in self.lines:
            self.lines.append(line)
            routes.show_text(self.node_id, "\n".join(self.lines))


def _job(setup: comfy_host.TrainingSetup, path: Path, photos: Sequence[Photo]) -> TrainingJob:
    return TrainingJob(
        setup.network,
        setup.task,
        setup.entropy,
        setup.config,
        path,
        captions=tuple(photo.caption for photo in photos),
        base_hash=setup.base_hash,
        guard=comfy_host.deaf_to_cancel,
        data_hash=setup.data_hash,
        checkpoints=comfy_host.checkpoint_folder(),
        painter=setup.painter,
        strip_path=comfy_host.strip_path(path),
        enable_checkpointing=setup.enable_checkpointing,
    )


def _wait_for(job: TrainingJob, notes: _Notes) -> TrainedLoRA:
    """Show progress until the job ends; Cancel stops it after its current step and saves."""
    bar = comfy_host.progress_bar(job.config.steps)
    shown = 0
    job.start()
    try:
        while not job.wait(_POLL_SECONDS):
            if job.progress.step != shown:
                shown = job.progress.step
                bar(shown)
            notes.show(job.progress.message)
            comfy_host.raise_if_cancelled()
    except BaseException:
        job.stop()
        job.wait()
        if job.progress.error is not None:
            logging.error("LoRA²: stopped, but not saved: %s", job.progress.error)
        raise
    bar(job.progress.step)
    if job.progress.error is not None:
        raise job.progress.error
    if job.result is None:
        raise RuntimeError("The training was stopped before its first step; there is no LoRA.")
    return job.result


def _outputs(cls: type[io.ComfyNode], model: Any, clip: Any, trained: TrainedLoRA) -> io.NodeOutput:
    path = trained.path
    patched = comfy_host.apply_state(model, clip, trained.file.state, 1.0, 1.0, path.name)
    headline = lora_file.headline(trained.file.metadata)
    picture = to_image(
        report.training_picture(trained.components, trained.history, path.stem, headline)
    )
    shown = ui.PreviewImage(picture, cls=cls)
    return io.NodeOutput(*patched, trained, str(path), picture, ui=shown)
