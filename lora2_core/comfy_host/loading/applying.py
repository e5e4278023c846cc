"""LoRAs as model patches, as the stock loader makes them, or beside the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ...config.load import WAYS, Strengths
from ...files.header import shown_key, shown_keys
from ...files.keys import ParsedKeys, counted
from ...files.metadata import understood_metadata
from ...files.model_family import guess_family, misfit, other_than_a_lora, unknown_components
from ...files.read import LoRAFile
from .. import surface
from ..errors import HostError
from . import accounts, bypass, exact, fitting, misfits
from .fitting import family_of, known_base_hash, layer_names

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_EVEN = Strengths()


@dataclass(frozen=True)
class Applied:
    """Clones with a LoRA on them, and what a person should know; empty when all is well."""

    model: ModelPatcher
    clip: Any | None
    note: str = ""


def apply_state(
    model: ModelPatcher,
    clip: Any | None,
    state: Mapping[str, Tensor],
    strength_model: float,
    strength_clip: float,
    source: str,
) -> tuple[ModelPatcher, Any | None]:
    """:func:`apply_lora` of tensors, evenly and as the model needs it: the two clones alone."""
    file = LoRAFile(dict(state), {})
    applied = apply_lora(model, clip, file, strength_model, strength_clip, source)
    return applied.model, applied.clip


def apply_lora(
    model: ModelPatcher,
    clip: Any | None,
    file: LoRAFile,
    strength_model: float,
    strength_clip: float,
    source: str,
    *,
    strengths: Strengths = _EVEN,
    way: str = "auto",
) -> Applied:
    """Clones of ``model`` and ``clip`` with a LoRA as patches, as whoever trained it means it.

    Every layer may have its own rank. ``way``: "merge" into the weights, "bypass" them (the forward
    pass adds the LoRA's own), or "auto": bypass where weights have eight bits or fewer. Raises
    HostError, naming ``source``, when the LoRA fits no layer of the model or was made for layers of
    another shape; nothing is patched then.
    """
    _check_way(way)
    every = layer_names(model, clip)
    file = _as_comfyui_names_it(file, every, source)
    parsed = file.parsed
    names = _asked_for(every, parsed)
    state = fitting.without_empty(file)
    if twice := accounts.changed_twice(parsed, names, state):
        raise HostError(_two_changes(twice, source))
    patches = _of_weights(comfy.lora.load_lora(state, names, False), names, model, clip)
    if not patches:
        raise HostError(_no_patch(file, state, model, source))
    factors = {
        key: strength_model * strengths.of(_weight(key)) if _is_unet(key) else strength_clip
        for key in patches
    }
    turned = exact.of_lycoris(parsed.others.get("oft", {}), names)
    patches, unrounded = _checked(model, clip, file, patches, factors, turned, source)
    notes = (
        _unknown(parsed, names, source, clip is not None),
        _unread(parsed, patches, source),
        accounts.left_out(parsed, names, state, patches, source),
        _other_base(model, file.metadata, source),
    )
    note = " ".join(filter(None, notes))
    if note:
        logging.warning("LoRA²: %s", note)
    if not surface.is_there(surface.Part.BYPASS):
        unrounded = set(patches)  # merging rounds; the log has said why at the start
    merged = {"merge": patches.keys(), "bypass": (), "auto": unrounded}[way]
    patched = _patched(model, clip, patches, factors, strength_clip, merged)
    return Applied(*patched, note)


def _as_comfyui_names_it(file: LoRAFile, names: Mapping[str, Any], source: str) -> LoRAFile:
    """``file`` in names of ``names``. Raises HostError where half of a component is missing, or two
    tensors would have the same."""
    try:
        file = fitting.in_known_names(file, names)
    except ValueError as twice:
        raise HostError(_two_changes(str(twice), source)) from None
    # Of a copy: some names are changed in the dictionary itself, which others may have.
    file = file.with_state(comfy.lora_convert.convert_lora(dict(file.state)))
    if lonely := file.parsed.lonely:
        raise HostError(f"{source} is damaged: {shown_key(lonely[0])} lacks its other half.")
    return file


def _check_way(way: str) -> None:
    if way not in WAYS:
        raise HostError(f"apply_as is {way!r}; choose one of {', '.join(WAYS)}.")
    surface.need(surface.Part.LOADING)
    if way == "bypass":
        surface.need(surface.Part.BYPASS)


def _two_changes(twice: str, source: str) -> str:
    return (
        f"{source} changes {twice}, and nobody says which of both counts; choose another LoRA, or "
        "make one file of each."
    )


def _checked(
    model: ModelPatcher,
    clip: Any | None,
    file: LoRAFile,
    patches: Mapping[Any, Any],
    factors: Mapping[Any, float],
    turned: Collection[Any],
    source: str,
) -> tuple[dict[Any, Any], set[Any]]:
    """``patches`` as their writers calculate them, and the weights that merging would not round.

    ``turned``: keys of weights that LyCORIS' rotations change.
    Raises HostError where a patch does not fit its weight, in shape or in the size of its numbers.
    """
    found, unrounded = dict[Any, Any](), set[Any]()
    for key, patch in patches.items():
        shape, dtype = _weight_of(model, clip, key)
        if shape is not None and (why := misfits.shape_misfit(patch, shape)):
            raise HostError(f"{_made_for_another(file, model, source)} ({key} {why}.)")
        if not bypass.is_coarse(dtype or model.model_dtype()):
            unrounded.add(key)
        found[key] = exact.as_trained(misfits.without_core(patch), shape, key in turned)
        _check_size(_patcher_of(model, clip, key), key, found[key], factors[key], source)
    return found, unrounded


def _check_size(patcher: ModelPatcher, key: Any, patch: Any, factor: float, source: str) -> None:
    """Raises HostError where a patched weight would no longer be a number."""
    if factor and misfits.too_large(patch, factor, patcher, key):
        raise HostError(
            f"{source} would turn {key} into what is no number at strength {factor:g}; lower the "
            "strength, or choose another LoRA."
        )


def _patched(
    model: ModelPatcher,
    clip: Any | None,
    patches: Mapping[Any, Any],
    strength_of: Mapping[Any, float],
    strength_clip: float,
    merged: Collection[Any],
) -> tuple[ModelPatcher, Any | None]:
    new_model, new_clip = model.clone(), None if clip is None else clip.clone()
    new_model.is_injected = False  # what is in the layers by now is the other's
    unet = {key: patch for key, patch in patches.items() if _is_unet(key)}
    factors = {key: strength_of[key] for key in unet}
    free = {key: patch for key, patch in unet.items() if key not in merged}
    beside = {key: patch for key, patch in free.items() if bypass.fits(model, key, patch)}
    if wanted := {key: patch for key, patch in beside.items() if factors[key]}:
        bypass.add_branches(new_model, wanted, factors)
    for factor in dict.fromkeys(factors.values()):
        group = {k: p for k, p in unet.items() if factors[k] == factor and k not in beside}
        if factor and group:
            new_model.add_patches(group, factor)
    if new_clip is not None and strength_clip:
        new_clip.add_patches({k: p for k, p in patches.items() if k not in unet}, strength_clip)
    return new_model, new_clip


def _weight(key: Any) -> str:
    """The weight that a patch is for; some are for a part of one only."""
    return key if isinstance(key, str) else key[0]


def _is_unet(key: Any) -> bool:
    return _weight(key).startswith("diffusion_model.")


def _of_weights(
    patches: Mapping[Any, Any], names: Mapping[str, Any], model: ModelPatcher, clip: Any | None
) -> dict[Any, Any]:
    """``patches`` without those for a bias that is not there: ComfyUI takes it for granted."""
    named = set(names.values())
    guessed = {key for key in patches if key not in named}
    if guessed:
        guessed -= model.model.state_dict().keys()
    if guessed and clip is not None:
        guessed -= clip.cond_stage_model.state_dict().keys()
    return {key: patch for key, patch in patches.items() if key not in guessed}


def _asked_for(names: dict[str, Any], parsed: ParsedKeys) -> dict[str, Any]:
    """Of all names of layers those that the file has: ComfyUI tries every kind of patch on each."""
    if parsed.unknown:  # of a kind that this pack cannot tell
        return names
    return {name: names[name] for name in parsed.names if name in names}


def _no_patch(file: LoRAFile, state: Mapping[str, Tensor], model: ModelPatcher, source: str) -> str:
    """Why nothing of ``file`` patches anything; ``state``: without what is empty."""
    components = [set(keys) for _, keys in file.parsed.components()]
    if not components and (other := other_than_a_lora(file.state)):
        return f"{source} is no LoRA but {other}."
    if not components or any(keys & state.keys() for keys in components):
        return _made_for_another(file, model, source)
    return (
        f"{source} changes nothing: every component has rank 0 or adds nothing; choose another "
        "LoRA."
    )


def _made_for_another(file: LoRAFile, model: ModelPatcher, source: str) -> str:
    state, pairs = file.state, file.parsed.pairs
    inputs = {p.name: state[p.down].shape[1:].numel() for p in pairs if state[p.down].dim()}
    for name in file.parsed.others.get("loha", {}):
        if (half := state.get(f"{name}.hada_w1_b")) is not None and half.dim():
            inputs[name] = half.shape[1:].numel()
    if not inputs:
        return (
            f"{source} fits no layer of this model, {family_of(model).text}; choose a LoRA for it."
        )
    return misfit(source, guess_family(inputs, file.metadata), family_of(model))


def _unknown(
    parsed: ParsedKeys,
    names: Mapping[str, Any],
    source: str,
    with_clip: bool,
) -> str:
    """What is said of components that the model has no layer for."""
    components = parsed.names
    missing = [name for name in components if name not in names]
    if not with_clip:  # those of the text encoders are no mistake
        missing = [name for name in missing if not name.startswith(("lora_te", "text_encoder"))]
    return unknown_components(source, missing, len(components))


def _unread(parsed: ParsedKeys, patches: Mapping[Any, Any], source: str) -> str:
    """What is said of tensors that a loader of LoRAs has no use for."""
    words = [one for one in parsed.loose if one.kind == "embedding"]
    of_words = {key for one in words for key in one.keys}
    read = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    unused = [key for keys in parsed.others.get("ia3", {}).values() for key in keys]
    left = [key for key in (*parsed.unknown, *unused) if key not in read | of_words]
    told = []
    if words:
        names = [one.name for one in words if one.name]
        called = f" ({shown_keys(names)})" if names else ""
        stem = shown_key(PurePath(source).stem)
        told.append(
            f"{source}: {counted(len(words), 'embedding')}{called} left out; copy the file to "
            f"models/embeddings and write embedding:{stem} in the prompt."
        )
    if left:
        kind = f"{counted(len(left), 'tensor')} of unknown kind"
        told.append(f"{source}: {kind} left out: {shown_keys(left)}.")
    return " ".join(told)


def _other_base(model: ModelPatcher, metadata: Mapping[str, str], source: str) -> str:
    """What is said where both know their base and it is not the same."""
    metadata = understood_metadata(metadata)
    try:
        precision = str(json.loads(metadata.get("lora2.config", "{}")).get("precision", ""))
    except (ValueError, AttributeError, RecursionError):  # somebody else's words
        return ""
    ours, theirs = known_base_hash(model, precision), metadata.get("lora2.base_model_hash", "")
    if not ours or not theirs or ours == theirs:
        return ""
    return (
        f"{source} was trained on another base model (hash {theirs[:10]}, this one is "
        f"{ours[:10]}); a fine-tune of the same family mostly does, with another likeness."
    )


def _weight_of(
    model: ModelPatcher, clip: Any | None, key: Any
) -> tuple[torch.Size | None, torch.dtype | None]:
    if not isinstance(key, str):
        return None, None  # a part of a weight: ComfyUI's business
    return misfits.weight_of(_patcher_of(model, clip, key).model, key)


def _patcher_of(model: ModelPatcher, clip: Any | None, key: Any) -> ModelPatcher:
    """Of whose weights ``key`` names one."""
    return model if clip is None or _is_unet(key) else clip.patcher
