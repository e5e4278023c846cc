"""How much of each judge's likeness is left when the subject is painted over in grey.

``python -m bench.paper.floor``: of the eleven drawn subjects themselves, in the ten places that the
benchmark asks for. What is left is the judge's floor: it comes from places and layout.
"""

from __future__ import annotations

import importlib
import runpy
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = ROOT / "bench" / "paper" / "results" / "floor.json"


def measured(base: Any, studies: Any, greyed: Any) -> dict[str, dict[str, float]]:
    """Judge → its likeness of the subjects themselves, and what is left of it without them."""
    found: dict[str, dict[str, float]] = {}
    for key, pictures in (("itself", lambda study: study.own), ("greyed", greyed)):
        said = [_judged(base, study, pictures(study)) for study in studies]
        for judge in said[0]:
            each = [told[judge] for told in said]
            found.setdefault(judge, {})[key] = round(statistics.fmean(each), 3)
            if key == "greyed":
                found[judge]["most"] = round(max(each), 3)  # of a subject
    return found


def _judged(base: Any, study: Any, views: Any) -> Mapping[str, float]:
    pixels = importlib.import_module("lora2_pack.tools.tiny_sdxl.pictures").to_pixels
    said = base.judge(study, pixels(view.image for view in views), range(len(views)))
    return {
        judge: statistics.fmean(told.get("likeness") or told["outside"])
        for judge, told in said.items()
    }


def main() -> int:
    runpy.run_path(str(ROOT / "tools" / "pack.py"))["register"]()
    pack = "lora2_pack.bench.paper"
    importlib.import_module("lora2_pack.tools.tiny_sdxl.host").open_comfyui()
    demo = importlib.import_module(f"{pack}.subjects.demo")
    base = importlib.import_module(f"{pack}.bases.demo").Demo.load()
    studies = [study for study in demo.tested(base.plan.prompts) if study.things]
    found = measured(base, studies, demo.greyed)
    write = importlib.import_module("lora2_pack.tools.tiny_sdxl.evaluation.figures").write_json
    write(FILE, found)
    for judge, told in found.items():
        left = f"{told['greyed']} without the subject, {told['most']} at most"
        print(f"{judge}: {told['itself']} as it is, {left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
