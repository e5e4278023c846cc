"""The commands: ``sheet``, ``train``, ``export`` and ``evaluate``.

ComfyUI has to be importable before most modules here are, so each command imports its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .host import COMFYUI


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it did its work."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_sdxl")
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="write contact sheets of all that is drawn")
    sheet.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    sheet.add_argument("--size", type=int, default=192, help="pixels rendered")
    sheet.add_argument("--tile", type=int, default=192, help="pixels shown")
    sheet.set_defaults(run=_sheet)
    train = commands.add_parser(
        "train", help="train what is not trained yet, from where it stopped"
    )
    train.add_argument("--work", type=Path, required=True, metavar="DIR", help="its state")
    train.add_argument("--threads", type=int, default=2, help="of torch")
    train.add_argument("--comfyui", type=Path, default=COMFYUI, metavar="DIR", help="ComfyUI")
    train.set_defaults(run=_train)
    train.add_argument(
        "--refine", action="store_true", help="the pack's own base, and neither stage before it"
    )
    export = commands.add_parser("export", help="write what was trained into the pack")
    export.add_argument("--work", type=Path, required=True, metavar="DIR", help="what to export")
    export.add_argument("--comfyui", type=Path, default=COMFYUI, metavar="DIR", help="ComfyUI")
    export.set_defaults(run=_export)
    _add_evaluate(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="judge what was trained: figures and grids")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    evaluate.add_argument(
        "--parts",
        nargs="+",
        default=["vae", "base", "speed"],
        metavar="PART",
        help="vae, base, speed",
    )
    evaluate.add_argument("--prompts", type=int, default=500, help="painted to judge the base")
    evaluate.add_argument("--threads", type=int, default=2, help="of torch")
    evaluate.add_argument("--comfyui", type=Path, default=COMFYUI, metavar="DIR", help="ComfyUI")
    evaluate.set_defaults(run=_evaluate)


def _sheet(options: argparse.Namespace) -> int:
    from .sheets import write_sheets

    for path in write_sheets(options.out, options.size, options.tile):
        print(path)
    return 0


def _train(options: argparse.Namespace) -> int:
    """Autoencoder, latents through it, base, and the judges: hours on two cores."""
    import torch

    from .host import open_comfyui

    torch.set_num_threads(options.threads)
    open_comfyui(options.comfyui)
    from ...lora2_core.tiny_sdxl.judge_networks import NETWORKS
    from .training import autoencoder, base, judges, latents
    from .training.run import read_average

    work = options.work
    if options.refine:
        return _refine(work)
    autoencoder.train(work / "autoencoder.safetensors")
    trained = autoencoder.trained_autoencoder(read_average(work / "autoencoder.safetensors"))
    pictures = latents.make_latents(trained, work / "latents", base.Recipe().pictures)
    base.train(work / "base.safetensors", pictures)
    for name in NETWORKS:
        judges.train(name, work / f"judge-{name}.safetensors")
    return 0


def _refine(work: Path) -> int:
    """Let the base of the pack learn on, through the pack's autoencoder: about an hour."""
    from ...lora2_core.tiny_sdxl import model as demo_model
    from .training import autoencoder, base, latents

    encoder = autoencoder.trained_autoencoder(demo_model.autoencoder_weights())
    recipe = base.Recipe(pictures=8_000, seed=1)  # other words, noise and times than before
    pictures = latents.make_latents(encoder, work / "latents", recipe.pictures)
    file, start = work / "base.safetensors", base.weights_of_the_pack()
    base.train(file, pictures, base.REFINING, recipe, start)
    return 0


def _export(options: argparse.Namespace) -> int:
    """Write the pack's weights and the judges'."""
    from .host import open_comfyui

    open_comfyui(options.comfyui)
    from ...lora2_core.tiny_sdxl import model as demo_model
    from ...lora2_core.tiny_sdxl.judge_networks import NETWORKS
    from ...lora2_core.tiny_sdxl.judges import WEIGHTS
    from .training import exporting, judges
    from .training.run import read_average

    trained = options.work / "autoencoder.safetensors"  # not there after --refine
    autoencoder = read_average(trained) if trained.is_file() else demo_model.autoencoder_weights()
    digest = exporting.export(options.work / "base.safetensors", autoencoder, demo_model.WEIGHTS)
    print(f"{demo_model.WEIGHTS}\nSHA-256 {digest}")
    if digest != demo_model.SHA256:
        print("Put it into lora2_core/tiny_sdxl/model.py, or the weights will be refused.")
    for name in NETWORKS:
        run = options.work / f"judge-{name}.safetensors"
        if run.is_file():
            file = WEIGHTS / f"{name}.safetensors"
            judges.export(run, file)
            print(file)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    """Print every figure and write them, with a grid of samples."""
    import torch

    from .host import open_comfyui

    torch.set_num_threads(options.threads)
    open_comfyui(options.comfyui)
    from .evaluation.report import evaluate

    evaluate(options.out, options.parts, options.prompts)
    return 0
