"""Pictures of some prompts by some methods, as the paper's figures 3, 4, A4 and A5 show them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

_SIDE = 1.5  # inches of a picture
_INK = "#222831"


def draw(
    photo: np.ndarray,
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[np.ndarray]],
    file: Path,
) -> None:
    """A row a method, a column a prompt, and the subject at the top left.

    Pictures: (height, width, 3) of 8 bits; of each row as many as there are prompts. Raises
    ValueError where they are not.
    """
    for name, pictures in rows.items():
        if len(pictures) != len(prompts):
            raise ValueError(f"{name} has {len(pictures)} pictures of {len(prompts)} prompts.")
    high, wide = len(rows) + 1, len(prompts) + 1
    with mpl.rc_context({"font.family": "DejaVu Sans", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(_SIDE * wide, _SIDE * (high - 0.25)), dpi=128)
        axes = figure.subplots(high, wide, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        for axis in axes.flat:
            axis.set_axis_off()
        axes[0, 0].imshow(photo)
        for column, prompt in enumerate(prompts, 1):
            text = "\n".join(textwrap.wrap(prompt, 21))
            axes[0, column].text(0.5, 0.06, text, ha="center", va="bottom", fontsize=8, color=_INK)
        for row, (name, pictures) in enumerate(rows.items(), 1):
            text = "\n".join(textwrap.wrap(name, 16))
            axes[row, 0].text(0.92, 0.5, text, ha="right", va="center", fontsize=9, color=_INK)
            for column, picture in enumerate(pictures, 1):
                axes[row, column].imshow(picture)
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
        figure.savefig(file)
