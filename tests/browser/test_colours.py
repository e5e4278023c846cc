"""A rank's colour stands in two languages: in the picture's and in the panel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora2_pack.lora2_core.reports import canvas
from lora2_pack.lora2_core.reports.report import Scale

MODULE = Path(__file__).resolve().parent.parent.parent / "web" / "lib" / "colours.mjs"
RANKS = (
    *([1], [8], [3, 3], [1, 2], [4, 5, 9, 19], [1, 2, 3, 7, 8, 33, 64]),
    *([2, 16, 100, 139], [1, 5, 255, 512], [1, 1000, 99_999, 1_000_000]),
)
ASK = """async ([source, given]) => {
  const url = "data:text/javascript," + encodeURIComponent(source);
  const { CIVIDIS, NOWHERE } = await import(url);
  const colours = given.map(ranks => {
    const scale = NOWHERE.reaching(ranks);
    return ranks.map(rank => scale.colour(rank).match(/[0-9]+/g).map(Number));
  });
  return { stops: CIVIDIS, colours };
}"""


def test_a_rank_has_one_colour_in_the_picture_and_in_the_panel(browser: Any):
    page = browser.new_page()
    found = page.evaluate(ASK, [MODULE.read_text(encoding="utf-8"), list(RANKS)])
    page.close()
    assert [tuple(stop) for stop in found["stops"]] == list(canvas.CIVIDIS)
    for ranks, colours in zip(RANKS, found["colours"], strict=True):
        scale = Scale(min(ranks), max(ranks))
        for rank, colour in zip(ranks, colours, strict=True):
            # One level of 255 apart where a half is rounded, which the two do in two ways.
            pairs = zip(scale.colour(rank), colour, strict=True)
            assert max(abs(a - b) for a, b in pairs) <= 1, (ranks, rank)
