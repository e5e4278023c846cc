"""Score Pictures: how much they look like the subject, and like their prompts."""

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..lora2_core import comfy_host
from ..lora2_core.reports import scoring, vision
from ..lora2_core.tiny_sdxl.judges import likeness_judges
from .common import CATEGORY, also_called, to_pictures


class LoRA2Score(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2Score",
            **also_called("dino score", "clip score", "evaluate"),
            display_name="Score Pictures",
            category=CATEGORY,
            description=(
                "Measures how much painted pictures look like photos of the subject (DINO, CLIP-I) "
                "and like their prompts (CLIP-T), as the LoRA² paper does. Nothing is downloaded."
            ),
            inputs=[
                io.Image.Input("images", tooltip="The painted pictures, as many as you like."),
                io.Image.Input("real", tooltip="Photos of the subject to compare them with."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "One line for all pictures, or a line for each in their order. Empty: the "
                        "prompts are not judged."
                    ),
                ),
                io.String.Input(
                    "without",
                    default="",
                    tooltip="Words that CLIP is not asked for, such as the rare word sks.",
                ),
                _judge("dino", vision.DINO),
                _judge("clip", vision.CLIP),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="One more judge of likeness."
                ),
                io.Boolean.Input(
                    "demo_judges",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Two more judges of likeness that come with the pack. They know the demo "
                        "model's drawn world and nothing else."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The scores as a table."),
                io.String.Output(display_name="json", tooltip="All of it for other nodes."),
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        real: list[torch.Tensor],
        prompts: list[str],
        without: list[str],
        dino: list[str],
        clip: list[str],
        clip_vision: list[Any] | None = None,
        demo_judges: list[bool] | None = None,
    ) -> io.NodeOutput:
        pictures = to_pictures(images)
        by_prompt: dict[str, list[scoring.Picture]] = {}
        for prompt, picture in zip(_prompts(prompts, len(pictures)), pictures, strict=True):
            by_prompt.setdefault(prompt, []).append(picture)
        folders = (comfy_host.judge_folder(name[0]) for name in (dino, clip))
        judges = vision.judges(*folders, without[0].strip())
        if not any(by_prompt):
            judges = [judge for judge in judges if judge.metric != "CLIP-T"]
        judges += map(comfy_host.clip_vision_judge, clip_vision or [])
        if demo_judges and demo_judges[0]:
            judges += likeness_judges()
        subject = scoring.Subject("subject", to_pictures(real), by_prompt)
        found = scoring.score([subject], judges)
        text = scoring.table(found)
        data = json.dumps([one.as_dict() for one in found])
        return io.NodeOutput(text, data, ui=ui.PreviewText(text))


def _judge(name: str, default: str) -> io.Input:
    return io.String.Input(
        name,
        default=default,
        tooltip=(
            "A folder below models/diffusers, or a name in Hugging Face's cache. Empty: not used."
        ),
    )


def _prompts(given: list[str], count: int) -> list[str]:
    """The prompt of each picture."""
    lines = [line.strip() for text in given for line in text.splitlines() if line.strip()]
    if len(lines) <= 1:
        return [lines[0] if lines else ""] * count
    if len(lines) != count:
        raise ValueError(
            f"prompts has {len(lines)} lines for {count} pictures; give one line for all of them, "
            "or one for each."
        )
    return lines
