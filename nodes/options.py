"""Options for training: four nodes to chain, one for each thing that one may want to change."""

from typing import Any

from comfy_api.latest import io

from ..lora2_core.config.checks import choice
from ..lora2_core.config.presets import AUTO, Options
from ..lora2_core.config.ranks import GROUPS
from ..lora2_core.config.train import (
    DataConfig,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
)
from .common import CATEGORY
from .widgets import options as widgets
from .widgets.sockets import OptionsSocket

_SWITCH = {AUTO: None, "on": True, "off": False}


class LoRA2DataOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "LoRA2DataOptions",
            "LoRA² data options",
            "Trigger word, captions, sizes and class images.",
            [*widgets.pictures(), *widgets.captions(), *widgets.class_images()],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput((options or Options()).joined(data=DataConfig(**settings)))


class LoRA2OptimizerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "LoRA2OptimizerOptions",
            "LoRA² optimizer options",
            "How weights are moved, and which noise counts how much.",
            [*widgets.optimizer(), *widgets.training(), *widgets.objective(), *widgets.strength()],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        name = settings.pop("optimizer")
        text = TextConfig(learning_rate=settings.pop("text_learning_rate"))
        noise = ("min_snr_gamma", "noise_offset", "timestep_low", "timestep_high")
        objective = ObjectiveConfig(**{key: settings.pop(key) for key in noise})
        gain = settings.pop("kept_gain", widgets.BY_MODE)  # graphs of before do not have it
        if settings["warm_up"] == widgets.BY_SCHEDULE:
            settings["warm_up"] = None
        return io.NodeOutput(
            (options or Options()).joined(
                optimizer=OptimizerConfig(**settings),
                optimizer_name=name,
                objective=objective,
                text=text,
                kept_gain=None if gain == widgets.BY_MODE else gain,
            )
        )


class LoRA2RankOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "LoRA2RankOptions",
            "LoRA² rank options",
            "How layers choose their rank. As they are, all settings are left to the mode.",
            [*widgets.rank_targets(), *widgets.rank_movement()],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        targets = [(group, settings.pop(f"{group}_rank")) for group in GROUPS]
        of_mode = {"freeze_fraction": widgets.BY_MODE, "rank_weight": widgets.BY_MODE}
        of_mode["growth"] = AUTO
        changes = {name: v for name, v in settings.items() if v != of_mode.get(name, 0)}
        if chosen := tuple((group, rank) for group, rank in targets if rank):
            changes["group_targets"] = chosen
        return io.NodeOutput((options or Options()).joined(rank=tuple(changes.items())))


class LoRA2SafetyOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "LoRA2SafetyOptions",
            "LoRA² safety options",
            "Memory, checkpoints, and samples painted meanwhile.",
            [*widgets.safety(), *widgets.samples(), *widgets.small_cards()],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        frozen = settings.get("frozen_weights", AUTO)  # graphs of before do not have it
        keep = ("checkpoint_steps", "checkpoint_minutes", "resume")
        prompts = [line.strip() for line in settings["sample_prompts"].splitlines()]
        samples = SampleConfig(
            prompts=tuple(filter(None, prompts)),
            every=settings["sample_every"],
            seed=settings["sample_seed"],
            steps=settings["sample_steps"],
            guidance=settings["sample_guidance"],
        )
        return io.NodeOutput(
            (options or Options()).joined(
                gradient_checkpointing=_switched(
                    "gradient_checkpointing", settings["gradient_checkpointing"]
                ),
                block_swap=_switched("block_swap", settings.get("block_swap", AUTO)),
                frozen_weights=None if frozen == AUTO else frozen,
                keep=KeepConfig(**{name: settings[name] for name in keep}),
                samples=samples,
            )
        )


def _switched(name: str, value: Any) -> bool | None:
    choice(name, value, tuple(_SWITCH))  # older ComfyUIs let a script say anything
    return _SWITCH[value]


def _schema(node_id: str, name: str, description: str, inputs: list[io.WidgetInput]) -> io.Schema:
    earlier = OptionsSocket.Input(
        "options", optional=True, tooltip="Options of another node, to have both."
    )
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=f"{CATEGORY}/options",
        description=f"{description} Connect it to Train LoRA² on images, or to the next options.",
        inputs=[earlier, *inputs],
        outputs=[OptionsSocket.Output(display_name="options", tooltip="For the training node.")],
    )
