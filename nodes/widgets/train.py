"""The sockets and widgets of Train LoRA² on images, in their order."""

from comfy_api.latest import io

from ...lora2_core.adaptive_rank import MODES
from ...lora2_core.config.presets import AS_SET, PRESETS
from ...lora2_core.config.train import PRECISIONS, SCHEDULES
from ...lora2_core.data.captions import BRACKETS
from .sockets import OptionsSocket

WAIT, BACKGROUND = "wait", "background"


def sockets() -> list[io.Input]:
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
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip=(
                "Optional: one mask per image, white where there is something to learn and black "
                "where not. Load images from a folder makes them from transparency."
            ),
        ),
        io.Image.Input(
            "class_images",
            optional=True,
            tooltip=(
                "Optional, for prior preservation: images of what your subject is one of. Set "
                "class_prompt in LoRA² data options."
            ),
        ),
        OptionsSocket.Input(
            "options",
            optional=True,
            tooltip="Optional: one of the LoRA² options nodes, or several in a chain.",
        ),
    ]


def settings() -> list[io.WidgetInput]:
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
            tooltip=(
                "Name below output/loras; a number is added. Nothing is overwritten, except by a "
                "resumed run its own unfinished file."
            ),
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
                "The size of the file instead of a mean rank: met within 3 percent and never "
                "exceeded. 0 is off."
            ),
        ),
    ]


def advanced_settings() -> list[io.WidgetInput]:
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
        _preset(),
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
                "Layers to adapt: attention (the paper), self-attention, cross-attention, "
                "attention+ff, attention+ff+conv, b-lora content, b-lora style, b-lora, or a "
                "regular expression over layer names."
            ),
        ),
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default="constant",
            tooltip=(
                "Of the learning rate. cosine warms up and then falls to 0: it bears a higher rate "
                "and ends cleaner. linear falls evenly. constant is the plain recipe."
            ),
        ),
    ]


def _preset() -> io.WidgetInput:
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default=AS_SET,
        optional=True,  # workflows from before it was there have none
        tooltip=(
            "Sets what it names, whatever the widgets say. paper: mode, steps, learning_rate, "
            "schedule, target_rank, target_megabytes, max_rank, batch_size, resolution, precision, "
            "targets and entropy_weight, as published (SDXL in about 14 GB). 12 GB, 8 GB, 6 GB and "
            "4 GB, for SDXL on such a card: mode balanced, batch_size 1, resolution 1024 or 768, "
            "precision and targets as they are by default; 6 GB and 4 GB keep frozen weights in "
            "fp8, and 4 GB those of transformer blocks in RAM. All of them: "
            "gradient checkpointing, and 8-bit Adam (package bitsandbytes; without it AdamW, in "
            "more memory)."
        ),
    )


def when() -> list[io.WidgetInput]:
    """Not of the run but of when it happens."""
    return [
        io.Combo.Input(
            "run",
            options=[WAIT, BACKGROUND],
            default=WAIT,
            optional=True,  # as above
            tooltip=(
                "wait: the prompt goes on when the LoRA is there. background: the prompt is done "
                "at once, what hangs on this node is left out, and the training goes on in the "
                "LoRA² tab. One runs at a time, in the order they were started."
            ),
        ),
        io.Boolean.Input(
            "yield_to_prompts",
            default=True,
            optional=True,
            tooltip=(
                "In the background only: training waits between two steps while a prompt runs, so "
                "that you can paint at full speed."
            ),
        ),
    ]


def brackets() -> io.WidgetInput:
    """The last: a saved workflow holds the values of widgets by their places."""
    return io.Combo.Input(
        "caption_brackets",
        options=list(BRACKETS),
        default=BRACKETS[0],
        optional=True,  # as above
        tooltip=(
            "Brackets in captions, instance_prompt, trigger and class_prompt. text: they are "
            "letters, as in kohya's trainer: 'robot (fate)' is a name, with or without "
            "backslashes. weights: as in a prompt, where (word:1.2) counts more. Sample prompts "
            "are prompts: they have weights either way."
        ),
    )
