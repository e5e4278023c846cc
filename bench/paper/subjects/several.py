"""Several drawn subjects in one LoRA, each with a word of its own.

What rank is for: a single subject is learnt by rank 2 as well as by rank 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....tools.tiny_sdxl.world.scenes import OBJECTS
from ....tools.tiny_sdxl.world.subjects import RARE_WORD, View
from .demo import drawn
from .study import Study

# One token each for SDXL's tokenizer, and in no caption that the base was trained on.
WORDS = (
    RARE_WORD, "rcn", "hmv", "bgc", "ndc", "wwx", "gsc", "csg",
    "npt", "bnp", "spp", "nrf", "bsf", "hns", "scd", "szn",
)  # fmt: skip
SIZES = (4, 8, 16)
TESTED, SWEPT = 5, 2  # groups of each size
_FIRST_SEED = 3000  # of the subjects; no other part of the benchmark draws these
_TUNING_SEED = 5000


def group(size: int, number: int, prompts: int, first: int = _FIRST_SEED) -> Study:
    """``size`` subjects and ``prompts`` prompts of each, in places that none was trained in."""
    kinds = [OBJECTS[(size * number + place) % len(OBJECTS)] for place in range(size)]
    seeds = [first + 100 * SIZES.index(size) + number * size + place for place in range(size)]
    members = [
        _called(drawn(seed, 10, kind), word)
        for seed, kind, word in zip(seeds, kinds, WORDS, strict=False)
    ]
    # Every subject in places of its own turn, so that each place is asked for equally often.
    asked = [
        (who, (who * prompts + turn) % len(members[who].prompts))
        for who in range(size)
        for turn in range(prompts)
    ]
    held = f"{number + 1}" if first == _FIRST_SEED else "tuning" + f"-{number + 1}" * bool(number)
    return Study(
        f"{size}-subjects-{held}",
        [view for one in members for view in one.photos],
        [members[who].prompts[which] for who, which in asked],
        [members[who].places[which] for who, which in asked],
        [members[who].things[which] for who, which in asked],
        [members[who].own[which] for who, which in asked],
        [one.photos for one in members],
        [who for who, _ in asked],
    )


def _called(study: Study, word: str) -> Study:
    """The same subject by another word than the usual one."""

    def renamed(views: Sequence[View]) -> list[View]:
        return [view._replace(caption=_with(view.caption, word)) for view in views]

    prompts = [_with(prompt, word) for prompt in study.prompts]
    return replace(study, photos=renamed(study.photos), prompts=prompts, own=renamed(study.own))


def _with(caption: str, word: str) -> str:
    return " ".join(word if one == RARE_WORD else one for one in caption.split())


def tested(size: int, prompts: int) -> list[Study]:
    """The groups that are tested."""
    return [group(size, number, prompts) for number in range(TESTED)]


def for_tuning(size: int, prompts: int) -> list[Study]:
    """The group that rates are chosen on."""
    return [group(size, 0, prompts, _TUNING_SEED)]


def for_sweep(size: int, prompts: int) -> list[Study]:
    """The groups that the default is chosen on."""
    return [group(size, number, prompts, _TUNING_SEED) for number in range(SWEPT)]
