"""A LoRA cut to a size in bytes by one singular value decomposition of everything.

Source: ours; see :mod:`.choice`. A run that is to fit into a size trains above it, by
``HEADROOM`` of ``adapters/budget.py``, in every mode: a fixed rank cut so is the rival that
adaptive ranks have to beat.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..files.component import Component, decompose
from ..files.encode import encoded_bytes, shapes_of, stored_ranks, to_state
from ..files.metadata import complete_metadata
from .choice import Part, choose_exactly, kept_energy, part_of


def fit_to_megabytes(
    components: Sequence[Component], metadata: Mapping[str, str], limit: int, min_rank: int = 1
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that takes ``limit`` bytes at most, header included.

    What fits stays as it was trained. Else all is decomposed and cut, and the metadata says so
    under ``lora2.svd``. A component may leave the file where its bytes, those of its header
    included, keep more elsewhere. A ``min_rank`` above 1 is left to every component; where not
    all can have it, it sinks for all. Raises LoRAFileError when not even one rank of one
    component fits.
    """
    state = to_state(components)
    ranks = stored_ranks(state, components)
    full = complete_metadata(metadata, components, ranks)
    size = encoded_bytes(shapes_of(state), full)
    if not state:
        return state, full
    if size <= limit:
        logging.info("LoRA²: what was learnt takes %s; nothing has to be cut.", _share(size, limit))
        return state, full
    whole = [decompose(component) for component in components]
    parts = [part_of(component, limit, decomposed=True) for component in whole]

    def metadata_at(ranks: Sequence[int]) -> dict[str, str]:
        return _metadata_at(whole, parts, ranks, metadata, limit)

    allowed = limit
    while True:
        chosen = choose_exactly(parts, metadata_at, allowed, limit, min_rank)
        cut = [component.first(rank) for component, rank in zip(whole, chosen, strict=True)]
        state = to_state(cut)
        full = metadata_at(chosen)
        left = encoded_bytes(shapes_of(state), full)
        if left <= limit:
            break
        # fp16 was said to do by a hair and does not: rounding of the sums that tell.
        allowed -= left - limit
    logging.info(
        "LoRA²: what was learnt takes %s; one SVD across %d components cut it to %s and kept "
        "%.2f %% of its energy.",
        _share(size, limit),
        len(parts),
        _share(left, limit),
        100 * kept_energy(parts, chosen),
    )
    return state, full


def _metadata_at(
    components: Sequence[Component],
    parts: Sequence[Part],
    ranks: Sequence[int],
    metadata: Mapping[str, str],
    limit: int,
) -> dict[str, str]:
    """The metadata of a file with these ranks."""
    svd = {
        "target_megabytes": limit / 1e6,
        "kept_energy": f"{kept_energy(parts, ranks):.6f}",  # always as long, as the size needs it
    }
    changed = {"lora2.svd": json.dumps(svd)}
    if "lora2.mean_rank" in metadata:
        changed["lora2.mean_rank"] = f"{sum(ranks) / len(ranks):.3f}"
    return complete_metadata({**metadata, **changed}, components, ranks)


def _share(size: int, limit: int) -> str:
    return f"{size / 1e6:.3f} MB of {limit / 1e6:.3f}"
