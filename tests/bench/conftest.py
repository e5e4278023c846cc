"""What several tests of the benchmark share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lora2_pack.bench.paper.bases.demo import Demo

SIDE = 64  # px


@pytest.fixture(scope="module")
def base(runtime: Any) -> Iterator[Demo]:
    """The demo base at a small size and two steps."""
    # Not above: this file is read before a ComfyUI is there.
    from lora2_pack.bench.paper.bases.demo import Demo

    found = Demo.load()
    sampling = replace(found.parts.sampling, steps=2)
    gc.freeze()  # every record collects garbage, but not among all that the session holds
    yield replace(found, parts=replace(found.parts, sampling=sampling), resolution=SIDE)
    gc.unfreeze()
