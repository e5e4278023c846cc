"""The family as ComfyUI's loaders find it in files, in the names and shapes of the real ones.

The files are thin: a header of the real names, shapes and types over a hole of gigabytes. ComfyUI's
loaders read them as they would the real ones, into models on torch's device "meta", which has
shapes and no data. So detection, types, layers and names are asked, and no weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from lora2_pack.bench.paper.bases.family import FAMILY, on_meta
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.copies.structure import plain
from lora2_pack.lora2_core.comfy_host.loading.fitting import family_of, layer_names
from lora2_pack.lora2_core.comfy_host.models import _sampling_of, _training_dtype
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*which is a no-op")  # of data, into shapes

META = torch.device("meta")
FP8 = torch.float8_e4m3fn
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", FP8: "F8_E4M3"}
NAMES |= {torch.uint8: "U8", torch.int64: "I64"}
PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": FP8}
OLD = hasattr(comfy.ops, "scaled_fp8_ops")  # 0.3.75's way of scaled fp8


@pytest.fixture(autouse=True)
def _without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI builds its models where a tensor is a shape, and moves none of them."""
    devices = ("unet_inital_load_device", "text_encoder_initial_device")
    for name in devices:
        monkeypatch.setattr(comfy.model_management, name, lambda *_: META)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)


def _thin(file: Path, tensors: Mapping[str, Tensor], filled: Mapping[str, bytes]) -> str:
    """A safetensors file of such tensors, whose data is a hole but for ``filled``."""
    header, offset = {}, 0
    places = {}
    for name, value in tensors.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        places[name], offset = offset, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, data in filled.items():
            out.seek(8 + len(text) + places[name])
            out.write(data)
        out.truncate(8 + len(text) + offset)
    return file.name


def _plain(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A member's U-Net by its names in a file of its own."""
    network = on_meta(name, torch.float32).diffusion_model
    return {key: value.to(dtype) for key, value in network.state_dict().items()}


def _quantised(state: dict[str, Tensor], prefix: str, old: bool) -> dict[str, bytes]:
    """Turn the weights of linear layers into fp8 with a scale; returns the data that is read."""
    told = b'{"format": "float8_e4m3fn"}'
    filled = {}
    for name in [n for n, v in state.items() if n.endswith(".weight") and v.ndim == 2]:
        layer = name.removesuffix("weight")
        state[name] = state[name].to(FP8)
        scale = f"{layer}scale_weight" if old else f"{layer}weight_scale"
        state[scale] = torch.empty((), device=META)
        filled[scale] = torch.tensor(0.5).numpy().tobytes()
        if not old:
            state[f"{layer}comfy_quant"] = torch.empty(len(told), dtype=torch.uint8, device=META)
            filled[f"{layer}comfy_quant"] = told
    if old:
        state[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=FP8, device=META)
    return filled


@pytest.fixture(scope="module")
def towers(comfyui: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The text encoders by their names in files of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "text_encoder_initial_device", lambda *_: META)
        options = {"custom_operations": plain()}  # dynamic VRAM's have no weights until loaded
        target = comfy.supported_models.SDXL({}).clip_target()
        clip = comfy.sd.CLIP(target, model_options=options)
    found = [getattr(clip.cond_stage_model, name).transformer for name in ("clip_l", "clip_g")]
    first, second = ({k: v.half() for k, v in tower.state_dict().items()} for tower in found)
    return first, second


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the loaders look for every kind of file."""
    for kind in ("checkpoints", "diffusion_models", "text_encoders"):
        found = ([str(tmp_path)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, found)
    return tmp_path


@pytest.fixture
def load(folder: Path, towers: Any) -> Any:
    """Writes a thin checkpoint, and loads it as the user's node does: MODEL and CLIP."""

    def loader(name: str, kind: str, more: tuple[str, ...] = ()) -> Any:
        prefix = "model.diffusion_model."
        state = _plain(name, PLAIN.get(kind, torch.float16))
        state = {f"{prefix}{key}": value for key, value in state.items()}
        filled = {} if kind in PLAIN else _quantised(state, prefix, kind == "scaled fp8")
        state |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in towers[0].items()}
        config = comfy.supported_models.SDXL({})
        second = {f"clip_g.transformer.{key}": value for key, value in towers[1].items()}
        state |= config.process_clip_state_dict_for_saving(second)
        state |= {key: torch.empty(0, device=META) for key in more}
        file = _thin(folder / "checkpoint.safetensors", state, filled)
        return nodes.CheckpointLoaderSimple().load_checkpoint(file)[:2]

    return loader


def _blocks(name: str) -> int:
    """Transformer blocks of a member's U-Net, by its depths."""
    down, middle, up = FAMILY[name]
    return sum(down) + max(middle, 0) + sum(up)


def _is_known(model: Any, clip: Any, name: str) -> None:
    """All that a training and a LoRA ask of a model before they touch a weight."""
    comfy_host.check_model(model)
    assert type(model.model.model_config).__name__ == name
    assert family_of(model).text == "SDXL (context 2048)"
    # Where weights are quantised, the layers are of no kind of torch's; those of a copy are.
    unet: Any = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    config = {**model.model.model_config.unet_config, "dtype": torch.float32}
    targets = find_targets(unet(**config, device=META, operations=plain()))
    assert len(targets) == 8 * _blocks(name)
    known = layer_names(model, clip)
    for target in targets:
        key = known[lora_file.kohya_key(target.name)]
        assert key == f"diffusion_model.{target.name}.weight"
    if clip is not None:
        _are_known(known)


def _are_known(known: dict[str, Any]) -> None:
    for tower, layers in (("te1", 12), ("te2", 32)):
        stem = f"lora_{tower}_text_model_encoder_layers"
        assert f"{stem}_{layers - 1}_mlp_fc2" in known and f"{stem}_{layers}_mlp_fc2" not in known


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_in_a_checkpoint(load: Any, name: str):
    model, clip = load(name, "fp16")
    _is_known(model, clip, name)
    assert comfy_host.prediction_of(model) == "EPS"


@pytest.mark.parametrize("kind", ["bf16", "fp8", "scaled fp8", "mixed"])
def test_a_checkpoint_in_other_types(load: Any, kind: str):
    if kind == "mixed" and OLD:
        pytest.skip("this ComfyUI has scaled fp8 of the older kind alone")
    model, clip = load("Segmind_Vega", kind)
    _is_known(model, clip, "Segmind_Vega")
    assert _training_dtype(model) in (torch.float32, torch.bfloat16, torch.float16)


def test_v_prediction_with_and_without_zero_terminal_snr(load: Any):
    highest = []
    for more in (("v_pred",), ("v_pred", "ztsnr")):
        model, _ = load("Segmind_Vega", "fp16", more)
        comfy_host.check_model(model)
        assert comfy_host.prediction_of(model) == "V_PREDICTION"
        highest.append(float(_sampling_of(model).sigmas.max()))
    # Of SDXL's betas the last; and ComfyUI's nearest to infinity.
    assert highest[0] == pytest.approx(14.6146, abs=1e-3) and highest[1] > 4000


@pytest.mark.parametrize(
    ("names", "dtype"), [("plain", "default"), ("diffusers", "default"), ("plain", "fp8_e4m3fn")]
)
def test_a_u_net_in_a_file_of_its_own(folder: Path, towers: Any, names: str, dtype: str):
    state = _plain("KOALA_700M", torch.float16)
    if names == "diffusers":
        theirs = comfy.utils.unet_to_diffusers(on_meta("KOALA_700M").model_config.unet_config)
        state = {key: state[ours] for key, ours in theirs.items() if ours in state}
    file = _thin(folder / "unet.safetensors", state, {})
    model = nodes.UNETLoader().load_unet(file, dtype)[0]
    _is_known(model, None, "KOALA_700M")
    assert (model.model_dtype() == FP8) == (dtype != "default")


def test_text_encoders_in_files_of_their_own(folder: Path, towers: Any, model: Any):
    files = [
        _thin(folder / f"{name}.safetensors", tower, {})
        for name, tower in zip(("clip_l", "clip_g"), towers, strict=True)
    ]
    _are_known(layer_names(model, nodes.DualCLIPLoader().load_clip(*files, "sdxl")[0]))


@pytest.mark.parametrize("sampling", ["lcm", "x0"])
def test_a_few_step_model_is_refused_by_its_sampling(model: Any, sampling: str):
    """As one samples LCM, and Lightning in one step."""
    sampled = ModelSamplingDiscrete().patch(model, sampling, False)[0]
    with pytest.raises(comfy_host.HostError, match=r"few steps.*undistilled"):
        comfy_host.check_model(sampled)
