"""Train LoRA² on images."""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..lora2_core import comfy_host, lora_file
from ..lora2_core.adapters.swapping import computes_in_ram
from ..lora2_core.config.checks import choice
from ..lora2_core.config.presets import AS_SET, build_config, replaced, with_stand_in
from ..lora2_core.config.train import TrainConfig, doubts_about_rates
from ..lora2_core.data.captions import BRACKETS, Brackets, as_prompt
from ..lora2_core.data.photos import Photo, check_photos
from ..lora2_core.files.header import LoRAFileError
from ..lora2_core.jobs.job import TrainingJob
from ..lora2_core.jobs.queue import Origin
from ..lora2_core.jobs.sampling import StripFile
from ..lora2_core.jobs.saving import TrainedLoRA
from ..lora2_core.reports.report import training_picture
from ..lora2_core.reports.strip import strip_png
from ..lora2_core.training.memory import LEARNING_BYTES, size
from ..lora2_core.training.optimizers.make import OptimizerError
from ..lora2_core.training.out_of_memory import Advice, suggestions
from ..lora2_core.training.setup import TrainingSetup
from .background import job_queue
from .common import CATEGORY, advanced, also_called, to_image
from .prompt_graph import base_of, needed_by
from .screen import routes
from .screen.curves import training_history
from .train_notes import Notes
from .waiting import wait_for
from .widgets import train as train_widgets
from .widgets.sockets import LoRA2Socket
from .widgets.train import BACKGROUND, WAIT

# Widgets that are no settings of the run itself.
_OF_THE_NODE = (
    "model",
    "clip",
    "vae",
    "instance_prompt",
    "file_name",
    "preset",
    "options",
    "run",
    "yield_to_prompts",
    "caption_brackets",
)


class LoRA2Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2Train",
            **also_called("lora trainer", "train lora", "dreambooth", "fine-tune", "adaptive rank"),
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
                *train_widgets.when(),
                advanced(train_widgets.brackets()),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP, ready for your prompts."),
                LoRA2Socket.Output(display_name="LORA2", tooltip="For Inspect Ranks."),
                io.String.Output(display_name="path", tooltip="Where the file was written."),
                io.Image.Output(display_name="report", tooltip="Loss, mean rank and rank map."),
                io.Custom("LORA_MODEL").Output(
                    display_name="lora_model",
                    tooltip="The LoRA itself, for ComfyUI's Load LoRA Model and Save LoRA Weights.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **lists: list[Any]) -> str:
        """A prompt that starts a training in the background starts one every time it is sent; one
        that waits is left out by ComfyUI when nothing has changed, as ever."""
        run = lists.get("run") or [WAIT]
        return secrets.token_hex(8) if run[0] == BACKGROUND else ""

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        run = (lists.get("run") or [WAIT])[0]
        choice("run", run, (WAIT, BACKGROUND))  # older ComfyUIs let a script say anything
        background = run == BACKGROUND
        if background:
            comfy_host.need(comfy_host.Part.BACKGROUND)
        pictures = {name: lists.pop(name, None) for name in ("images", "captions", "masks")}
        class_images = lists.pop("class_images", None)
        one = {name: values[0] for name, values in lists.items()}
        notes = Notes(cls.hidden.unique_id)
        brackets = one.get("caption_brackets", BRACKETS[0])
        config = _read_as(brackets, _config(one, notes))
        for doubt in (*doubts_about_rates(config), *_about_class_images(config, class_images)):
            notes.say(doubt)
        photos = check_photos(
            pictures["images"],
            pictures["captions"],
            one["instance_prompt"],
            pictures["masks"],
            config.data.trigger,
            brackets,
        )
        queue = job_queue()
        path = comfy_host.new_lora_path(one["file_name"], queue.paths())
        setup = _prepared(one, photos, config, _class_photos(class_images, config), path, notes)
        for line in _about_run(setup):
            notes.say(line)
        job = TrainingJob(
            setup,
            path,
            guard=comfy_host.deaf_to_cancel,
            checkpoints=comfy_host.checkpoint_folder(),
            strip=StripFile(comfy_host.strip_path(path), strip_png),
            busy=_busy(background and one.get("yield_to_prompts", True)),
        )
        del setup  # the job alone holds the private copy, and lets go of it at its end
        entry = queue.add(job, _origin(cls.hidden, path), background)
        if background:
            notes.show("This runs in the background; see the LoRA² tab.")
            return io.NodeOutput(*[comfy_host.blocked() for _ in cls.define_schema().outputs])
        return _outputs(cls, one["model"], one["clip"], wait_for(queue, entry, notes))


def _config(one: Mapping[str, Any], notes: Notes) -> TrainConfig:
    """What widgets, preset and options come to, and what of it this machine can do."""
    settings = {name: value for name, value in one.items() if name not in _OF_THE_NODE}
    preset, options = one.get("preset", AS_SET), one.get("options")
    config = build_config(settings, preset, options)
    if changes := replaced(settings, preset):
        notes.say(f"The preset {preset} sets {changes}.")
    try:
        comfy_host.check_settings(one["model"], config)
    except OptimizerError as error:
        other = with_stand_in(config, preset, options)
        if other is None:
            raise
        took, takes = (LEARNING_BYTES[c.optimizer.name] for c in (config, other))
        notes.say(
            f"The preset {preset}: {error} Until then {other.optimizer.name} stands in, with "
            f"{takes:g} bytes of memory for each number that learns instead of {took:g}."
        )
        return other
    return config


def _prepared(
    one: Mapping[str, Any],
    photos: Sequence[Photo],
    config: TrainConfig,
    class_photos: Sequence[Photo],
    path: Path,
    notes: Notes,
) -> TrainingSetup:
    """All that can be refused is, before a photo is encoded."""
    plan = comfy_host.plan_training(
        *(one[name] for name in ("model", "clip", "vae")),
        photos,
        config,
        class_photos,
        comfy_host.cache_folder(),
    )
    lora_file.check_writable(path, plan.expected_bytes)
    for line in (*_about_memory(plan), *_about_folders(config, path)):
        notes.say(line)
    return comfy_host.carry_out(plan)


def _busy(yields: bool) -> Callable[[], bool]:
    """Whether a training should wait for a prompt; never for one that waits for a training."""
    if not yields:
        return lambda: False
    queue = job_queue()
    return lambda: routes.prompt_running() and not queue.prompt_waits()


def _origin(hidden: Any, path: Path) -> Origin:
    prompt, node_id = hidden.prompt or {}, hidden.unique_id
    return Origin(path.stem, node_id, needed_by(prompt, node_id), base_of(prompt, node_id))


def _read_as(brackets: Brackets, config: TrainConfig) -> TrainConfig:
    """``config`` with the prompt of class images as they are trained and painted."""
    prompt = as_prompt(config.data.class_prompt, brackets)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_prompt=prompt))


def _class_photos(images: list[torch.Tensor] | None, config: TrainConfig) -> Sequence[Photo]:
    if not images:
        return ()
    if not config.data.class_prompt.strip():
        raise ValueError(
            "class_images is connected, but class_prompt is empty; write what those images show in "
            "a LoRA² data options node, or disconnect them."
        )
    return check_photos(images, None, config.data.class_prompt, brackets="weights")


def _about_class_images(config: TrainConfig, given: Any) -> Iterator[str]:
    if config.data.class_prompt.strip() and not config.data.class_images and not given:
        yield (
            "class_prompt does nothing without class images; connect some, or set class_images in "
            "the LoRA² data options to how many the model is to paint (100, say)."
        )


def _about_memory(plan: "comfy_host.TrainingPlan") -> Iterator[str]:
    """What to do where the device has less memory than what lies there all the time."""
    there, least = comfy_host.total_memory(), plan.least_memory.total
    if there is not None and least > there:
        in_ram = computes_in_ram(plan.model.load_device)
        ways = suggestions(plan.leanest, least, there, in_ram=in_ram)
        yield (
            f"This will not fit: the model and what learns take {size(least)} before anything is "
            f"computed, and there are {size(there)} in all."
        ) + _that_would_help(ways)


def _about_folders(config: TrainConfig, path: Path) -> Iterator[str]:
    """What a run cannot keep beside its LoRA, and can do without."""
    places: dict[str, Path] = {}
    if config.samples.prompts:
        places["Samples"] = comfy_host.strip_path(path)
    if config.keep.checkpoint_steps or config.keep.checkpoint_minutes:
        places["Checkpoints"] = comfy_host.checkpoint_folder() / path.name
    for what, place in places.items():
        try:
            lora_file.check_writable(place, 0)
        except LoRAFileError as error:
            yield f"{what} of this run will not be kept: {error}"


def _that_would_help(ways: Sequence[Advice]) -> str:
    return f" What would help: {'; or '.join(way.text for way in ways)}." if ways else ""


def _about_run(setup: TrainingSetup) -> Iterator[str]:
    """What the run will take, and what to do where that is more than there is."""
    expected = setup.estimate
    if expected is None:
        return
    yield f"This run takes {expected.text()}."
    needed = expected.memory.learning + expected.memory.activations  # the model is there by now
    free = comfy_host.free_memory()
    if free is not None and needed > free:
        in_ram = computes_in_ram(setup.network.log_nu.device)
        ways = suggestions(setup.config, needed, free, expected=expected, in_ram=in_ram)
        text = f"That may be too much: {size(free)} are free for {size(needed)}."
        yield text + _that_would_help(ways)


def _outputs(cls: type[io.ComfyNode], model: Any, clip: Any, trained: TrainedLoRA) -> io.NodeOutput:
    path = trained.path
    patched = comfy_host.apply_state(model, clip, trained.file.state, 1.0, 1.0, path.name)
    headline = lora_file.headline(trained.file.metadata)
    history = training_history(trained)
    picture = to_image(training_picture(trained.components, history, path.stem, headline))
    shown = ui.PreviewImage(picture, cls=cls)
    state = dict(trained.file.state)
    return io.NodeOutput(*patched, trained, str(path), picture, state, ui=shown)
