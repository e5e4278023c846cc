"""Train LoRA² on images."""

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host, lora_file, report
from ..lora2_core.adaptive_rank import MODES
from ..lora2_core.config import PRECISIONS, SCHEDULES, TrainConfig
from ..lora2_core.dataset import check_photos
from ..lora2_core.jobs import TrainedLoRA, TrainingJob
from ..lora2_core.rank_config import RankConfig
from .common import CATEGORY, LoRA2Socket, advanced, to_image

_POLL_SECONDS = 0.1


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
            inputs=[*_sockets(), *_settings(), *map(advanced, _advanced_settings())],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP, ready for your prompts."),
                LoRA2Socket.Output(display_name="LORA2", tooltip="For Inspect Ranks."),
                io.String.Output(display_name="path", tooltip="Where the file was written."),
                io.Image.Output(display_name="report", tooltip="Loss, mean rank and rank map."),
            ],
        )

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        images, captions = lists.pop("images"), lists.pop("captions", None)
        one = {name: values[0] for name, values in lists.items()}
        config = _config(one)
        photos = check_photos(images, captions, one["instance_prompt"])
        path = comfy_host.new_lora_path(one["file_name"])
        model, clip = one["model"], one["clip"]
        setup = comfy_host.prepare_training(model, clip, one["vae"], photos, config)
        lora_file.check_writable(path, setup.network.expected_bytes())
        job = TrainingJob(
            setup.network,
            setup.task,
            setup.entropy,
            setup.config,
            path,
            captions=tuple(photo.caption for photo in photos),
            base_hash=setup.base_hash,
            guard=comfy_host.deaf_to_cancel,
        )
        del setup  # the job alone holds the private copy, and lets go of it at its end
        trained = _wait_for(job)
        patched, patched_clip = comfy_host.apply_state(
            model, clip, trained.file.state, 1.0, 1.0, path.name
        )
        picture = to_image(
            report.training_picture(
                trained.components,
                trained.history,
                path.stem,
                lora_file.headline(trained.file.metadata),
            )
        )
        return io.NodeOutput(
            patched,
            patched_clip,
            trained,
            str(path),
            picture,
            ui=ui.PreviewImage(picture, cls=cls),
        )


def _wait_for(job: TrainingJob) -> TrainedLoRA:
    """Show progress until the job ends; Cancel stops it after its current step and saves."""
    bar = comfy_host.progress_bar(job.config.steps)
    shown = 0
    job.start()
    try:
        while not job.wait(_POLL_SECONDS):
            if job.progress.step != shown:
                shown = job.progress.step
                bar(shown)
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
    assert job.result is not None  # a job without error has saved
    return job.result


def _config(one: dict[str, Any]) -> TrainConfig:
    # 0 leaves a setting to the mode.
    chosen = ("target_rank", "target_megabytes", "max_rank")
    ranks = {name: one[name] for name in chosen if one[name]}
    return TrainConfig(
        steps=one["steps"],
        learning_rate=one["learning_rate"],
        batch_size=one["batch_size"],
        resolution=one["resolution"],
        seed=one["seed"],
        precision=one["precision"],
        schedule=one["schedule"],
        entropy_weight=one["entropy_weight"],
        targets=one["targets"],
        rank=RankConfig.for_mode(one["mode"], **ranks),
    )


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="An SDXL-family model. It is left exactly as it is."),
        io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint, to read the prompts."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint, to encode the photos."),
        io.Image.Input("images", tooltip="3 to 30 photos of your subject, as a batch or a list."),
        io.String.Input(
            "captions",
            optional=True,
            force_input=True,
            tooltip=(
                "Optional: one caption per image, in the same order, or one for all. Empty ones "
                "use the instance prompt."
            ),
        ),
    ]


def _settings() -> list[io.WidgetInput]:
    return [
        io.String.Input(
            "instance_prompt",
            default="a photo of sks subject",
            tooltip=(
                "What the photos show, with a rare word that will stand for your subject: 'a photo "
                "of sks cat'. Use the same words when you paint."
            ),
        ),
        io.Int.Input(
            "steps",
            default=500,
            min=1,
            max=1_000_000,
            tooltip="Training steps. The paper uses 500 for SDXL and 800 for KOALA-700m.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=1e-8,
            tooltip="How fast the LoRA learns. The paper uses 0.00005.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default="balanced",
            tooltip=(
                "balanced: ranks follow what each layer needs, within a budget. paper: every "
                "formula of arXiv 2603.21884 to the letter; files come out several times larger. "
                "fixed: a plain LoRA to compare with, the target rank in every layer."
            ),
        ),
        *_budget(),
        io.String.Input(
            "file_name",
            default="lora2/subject",
            tooltip="Name below output/loras; a number is added, nothing is ever overwritten.",
        ),
    ]


def _budget() -> list[io.WidgetInput]:
    return [
        io.Float.Input(
            "target_rank",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=1.0,
            tooltip=(
                "Mean rank to aim at. 0 takes the mode's own: 16 in balanced and fixed, 1 in paper "
                "(where it is a pull, not a budget)."
            ),
        ),
        io.Float.Input(
            "target_megabytes",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=1.0,
            tooltip=(
                "Aim at a file of about this size instead of a mean rank (in paper mode a pull, "
                "not a budget). 0 is off."
            ),
        ),
    ]


def _advanced_settings() -> list[io.WidgetInput]:
    return [
        io.Int.Input(
            "max_rank",
            default=0,
            min=0,
            max=4096,
            tooltip=(
                "Largest rank of a single layer. 0 takes the mode's own: 128 in balanced, 512 in "
                "paper and fixed, less where the layers are smaller."
            ),
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=256,
            tooltip="Photos per step. More is smoother and needs more memory.",
        ),
        io.Int.Input(
            "resolution",
            default=1024,
            min=64,
            max=4096,
            step=32,
            tooltip="Side of the square the photos are cut to, in px. SDXL is at home at 1024.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="The same seed and settings give the same file on the same machine.",
        ),
        *_expert_settings(),
    ]


def _expert_settings() -> list[io.WidgetInput]:
    return [
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            tooltip=(
                "Of the frozen model while training; auto takes ComfyUI's, but bf16 rather than "
                "fp16 where the card can (in fp16 the entropy term fades away). The LoRA itself "
                "always trains in fp32."
            ),
        ),
        io.Float.Input(
            "entropy_weight",
            default=1e-4,
            min=0.0,
            max=10.0,
            step=1e-5,
            round=1e-7,
            tooltip=(
                "λ_e of the paper: sharpens which words each image region listens to. 0 switches "
                "it off and saves time."
            ),
        ),
        io.String.Input(
            "targets",
            default="attention",
            tooltip=(
                "Layers to adapt: attention (the paper), self-attention, cross-attention, or a "
                "regular expression over layer names."
            ),
        ),
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default="constant",
            tooltip=(
                "Of the learning rate. cosine warms up and then falls to 0: it bears a higher rate "
                "and ends cleaner. constant is the plain recipe."
            ),
        ),
    ]
