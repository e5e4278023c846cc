"""The widgets of the nodes of options, in their order."""

from comfy_api.latest import io

from ...lora2_core.config.presets import AUTO
from ...lora2_core.config.ranks import GROUPS
from ...lora2_core.config.train import FROZEN_WEIGHTS, MAX_PROMPTS, OPTIMIZERS

BY_SCHEDULE = -1.0  # the value of warm_up that leaves it to the schedule
BY_MODE = -1.0  # of settings of ranks for which 0 is a value like others
GROWTHS = ("zero", "random")


def _share(name: str, default: float, tooltip: str, step: float = 0.01) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


def pictures() -> list[io.WidgetInput]:
    return [
        io.Boolean.Input(
            "buckets",
            default=True,
            tooltip=(
                "Keep the shape of each photo, at about as many pixels as the resolution squared, "
                "never enlarged. Off cuts the middle square out of each."
            ),
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            tooltip="Also learn from each photo's mirror image. Not for faces, text or logos.",
        ),
    ]


def captions() -> list[io.WidgetInput]:
    return [
        io.String.Input(
            "trigger",
            default="",
            tooltip="A word that is put before every caption that does not hold it, such as 'sks'.",
        ),
        _share(
            "caption_dropout",
            0.0,
            "Share of the steps that learn without the caption. 0.05 to 0.1 helps a style; leave "
            "it 0 for a subject.",
        ),
        io.Boolean.Input(
            "caption_shuffle",
            default=False,
            tooltip="Change the order of comma-separated tags, so that none depends on its place.",
        ),
        io.Int.Input(
            "keep_tags",
            default=1,
            min=0,
            max=1000,
            tooltip="So many tags at the front stay where they are when tags are shuffled.",
        ),
    ]


def class_images() -> list[io.WidgetInput]:
    return [
        io.String.Input(
            "class_prompt",
            default="",
            tooltip=(
                "Prior preservation (DreamBooth): what your subject is one of, such as 'a photo of "
                "a cat'. The model keeps what it knows of it. Empty is off."
            ),
        ),
        io.Int.Input(
            "class_images",
            default=0,
            min=0,
            max=10_000,
            tooltip=(
                "How many images of that class to learn beside the photos; DreamBooth takes 100 to "
                "200. What is not connected the model paints itself, once, and keeps."
            ),
        ),
        io.Float.Input(
            "prior_weight",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.05,
            tooltip="How much the class images count against the photos. DreamBooth: 1.",
        ),
    ]


def optimizer() -> list[io.WidgetInput]:
    return [
        io.Combo.Input(
            "optimizer",
            options=[AUTO, *OPTIMIZERS],
            default=AUTO,
            tooltip=(
                "auto: what the preset says, else adamw. adamw8bit remembers in a quarter of the "
                "memory (package bitsandbytes). prodigy finds its own rate: set learning_rate to 1 "
                "(package prodigyopt)."
            ),
        ),
        io.Float.Input(
            "weight_decay",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.001,
            round=1e-5,
            tooltip="Pulls the LoRA towards nothing. The paper: 0; 0.01 is common.",
        ),
        io.Float.Input(
            "warm_up",
            default=BY_SCHEDULE,
            min=BY_SCHEDULE,
            max=1.0,
            step=0.01,
            tooltip="Share of the steps in which the rate rises. -1 leaves it to the schedule.",
        ),
    ]


def training() -> list[io.WidgetInput]:
    return [
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=1024,
            tooltip="Batches a step: 4 learns like a batch four times as large, in its memory.",
        ),
        io.Float.Input(
            "clip_norm",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.1,
            tooltip="Longest gradient of a step; 1 is common and calms a restless loss. 0 is off.",
        ),
        _share(
            "ema",
            0.0,
            "Save an average of the last weights: 0.99 averages about 100 steps. 0 is off.",
            0.001,
        ),
        io.Float.Input(
            "text_learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-8,
            tooltip=(
                "Also train adapters on the two text encoders at this rate; half of learning_rate "
                "is common. 0 is off, as in the paper."
            ),
        ),
    ]


def objective() -> list[io.WidgetInput]:
    return [
        io.Float.Input(
            "min_snr_gamma",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.5,
            tooltip="Min-SNR-γ: evens out what noise levels count. 5 is common, 0 is off.",
        ),
        _share("noise_offset", 0.0, "Lets it learn very dark and bright pictures: 0.05. 0 is off."),
        _share("timestep_low", 0.0, "Learn only from this share of the noise levels on. 0 is all."),
        _share("timestep_high", 1.0, "And up to this share, 1 the most noise."),
    ]


def strength() -> list[io.WidgetInput]:
    """Optional and last, so that workflows from before there was one keep what they say."""
    return [
        io.Float.Input(
            "kept_gain",
            default=BY_MODE,
            min=BY_MODE,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=(
                "The LoRA is saved at the smallest strength that keeps this share of what it has "
                "learnt, by the loss on fixed noise: what is left out costs the prompt more than "
                "it gives. 1 saves it as it was trained. -1: 0.96 in balanced, 1 in the others."
            ),
        ),
    ]


def rank_targets() -> list[io.WidgetInput]:
    where = {
        "self": "self-attention",
        "cross": "cross-attention",
        "down": "the way down",
        "mid": "the middle",
        "up": "the way up",
    }
    groups = [
        io.Float.Input(
            f"{group}_rank",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=1.0,
            tooltip=f"Mean rank of its own for {where[group]}. 0: part of the common target.",
        )
        for group in GROUPS
    ]
    return [
        io.Int.Input(
            "min_rank", default=0, min=0, max=4096, tooltip="Smallest rank of a layer. 0: it is 1."
        ),
        *groups,
    ]


def rank_movement() -> list[io.WidgetInput]:
    return [
        io.Float.Input(
            "freeze_fraction",
            default=BY_MODE,
            min=BY_MODE,
            max=1.0,
            step=0.01,
            tooltip=(
                "Share of the steps at the end in which ranks stay, for the weights to settle. -1: "
                "0.2 in balanced, 0 in paper."
            ),
        ),
        io.Combo.Input(
            "growth",
            options=[AUTO, *GROWTHS],
            default=AUTO,
            tooltip=(
                "How a new rank begins: zero leaves the picture as it was, random is the paper's. "
                "auto: the mode's own."
            ),
        ),
        _share("quantile", 0.0, "q of the paper: where a rank's importance ends. 0: it is 0.9."),
        io.Float.Input(
            "rank_learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=1e-6,
            tooltip="How fast ranks move. 0: it is 0.02.",
        ),
        io.Float.Input(
            "rank_weight",
            default=BY_MODE,
            min=BY_MODE,
            max=1e6,
            step=1e-4,
            round=1e-7,
            tooltip=(
                "λ_r of the paper, the pull towards the target rank; in balanced mode where the "
                "controller of it starts. -1: the mode's own."
            ),
        ),
    ]


def safety() -> list[io.WidgetInput]:
    return [
        io.Combo.Input(
            "gradient_checkpointing",
            options=[AUTO, "on", "off"],
            default=AUTO,
            tooltip=(
                "Computes every transformer block twice, in a fraction of the memory and about 1.5 "
                "times the time. auto: as the preset says, or else as few blocks as the free "
                "memory asks for."
            ),
        ),
        io.Int.Input(
            "checkpoint_steps",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="A checkpoint every so many steps. 0: only by time, and when a run is stopped.",
        ),
        io.Float.Input(
            "checkpoint_minutes",
            default=10.0,
            min=0.0,
            max=1e6,
            step=1.0,
            tooltip="And every so many minutes. 0: only by steps.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            tooltip=(
                "Go on where the same run was interrupted: same model, photos and settings. Off "
                "starts anew."
            ),
        ),
    ]


def samples() -> list[io.WidgetInput]:
    return [
        io.String.Input(
            "sample_prompts",
            default="",
            multiline=True,
            tooltip=(
                f"Painted meanwhile: up to {MAX_PROMPTS} prompts, one a line. They are read as "
                "everywhere in ComfyUI, (word:1.2) with its weight. Empty is off."
            ),
        ),
        io.Int.Input(
            "sample_every",
            default=100,
            min=1,
            max=1_000_000,
            tooltip="Paint them every so many steps. The strip goes to output/lora2_samples.",
        ),
        io.Int.Input(
            "sample_seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="The same noise each time, so that only the LoRA makes the difference.",
        ),
        io.Int.Input(
            "sample_steps", default=20, min=1, max=1000, tooltip="Sampling steps of a picture."
        ),
        io.Float.Input(
            "sample_guidance",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="How closely samples follow their prompt (CFG).",
        ),
    ]


def small_cards() -> list[io.WidgetInput]:
    """Optional and last, so that workflows from before there was one keep what they say."""
    return [
        io.Combo.Input(
            "frozen_weights",
            options=[AUTO, *FROZEN_WEIGHTS],
            default=AUTO,
            optional=True,
            tooltip=(
                "fp8 keeps the weights of the model that do not learn in 8 bits while it trains: "
                "half the memory of 16 bits for them, a little slower, and the LoRA learns on "
                "rounded weights. auto: what the preset says, else as precision."
            ),
        ),
        io.Combo.Input(
            "block_swap",
            options=[AUTO, "on", "off"],
            default=AUTO,
            optional=True,
            tooltip=(
                "Keeps the frozen weights of transformer blocks in RAM and fetches each block just "
                "before it computes: a fifth of the weights stay on the card, and steps take "
                "longer. auto: as the preset says, or else as few blocks as the free memory asks "
                "for."
            ),
        ),
    ]
