"""The tiny base model from the command line: python -m tools.tiny_sdxl train --work DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    return parser


def _sheet(options: argparse.Namespace) -> int:
    from .sheets import write_sheets

    for path in write_sheets(options.out, options.size, options.tile):
        print(path)
    return 0


def _train(options: argparse.Namespace) -> int:
    """Autoencoder, then latents through it, then the base: hours on two cores."""
    import torch

    from .host import open_comfyui

    torch.set_num_threads(options.threads)
    open_comfyui(options.comfyui)
    from . import autoencoder, base, latents

    work = options.work
    autoencoder.train(work / "autoencoder.safetensors")
    trained = autoencoder.trained_autoencoder(work / "autoencoder.safetensors")
    pictures = latents.make_latents(trained, work / "latents", base.Recipe().pictures)
    base.train(work / "base.safetensors", pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
