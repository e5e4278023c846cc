"""What people take for a LoRA: the sentence says what it is, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import LoRAFileError, read_header
from lora2_pack.lora2_core.files.model_family import other_than_a_lora
from lora2_pack.lora2_core.files.read import inspect, load
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from safetensors.torch import save_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9cb970\nsize 23390424\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "but a Git LFS pointer in place of the file; use git lfs pull"),
        (b"<!DOCTYPE html><html>login</html>", "but a web page, mostly one that asks for a log-in"),
        (b"\xef\xbb\xbf\n<html><body>no</body></html>", "but a web page"),
        (b'{"error":"Unauthorized","message":"log in"}', r'but text \(\{"error":"Unauthorized"'),
        (b'[{"error": "\xff\n\x1b[2J"}]', r'but text \(\[\{"error": ".\?\?\[2J"'),
        (b"GGUF\x03\0\0\0\0\0\0\0", "but a GGUF model"),
        (b"PK\x03\x04archive/data.pkl", "it is pickled"),
        (b"(dp0\nS'a'\np1\n", "it is pickled"),
        (b"\x80\x05\x95\0\0\0\0", "it is pickled"),
        (b"PK\x03\x04\x14\0cat.safetensors", "but a zip archive; unpack it, and choose"),
        (b"PK\x05\x06" + bytes(18), "but a zip archive"),
        (b"\x1f\x8b\x08\0\0\0", "but a gzip archive; unpack"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "but a 7z archive"),
        (b"Rar!\x1a\x07\x01\0", "but a RAR archive"),
        (b"Not Found", "but plain text; download it again, or choose another"),
        ("zu groß für heute: ä".encode() * 20, "but plain text"),
        (
            b'\x68\0\0\0\0\0\0\0{"w":{"dtype":"F8_E4M3FNUZ","shape":[1],"data_offsets":[0,1]}}'.ljust(
                112
            )
            + b"\0",
            r"is a safetensors file, but w is of the type F8_E4M3FNUZ, which",
        ),
        (b"\x80\x02}q\x00X\x05", "it is pickled"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it has no header"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoRAFileError, match=said) as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("clip_g", "clip_l"), "a textual inversion"),
        (("emb_params",), "a textual inversion"),
        (("<cat-toy>",), "a textual inversion"),
        (("image_proj.latents", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
        (("zero_convs.0.0.weight", "lora_controlnet"), "a Control-LoRA"),
        (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
        (("controlnet_down_blocks.0.weight", "down_blocks.0.resnets.0.conv1.weight"), "a ControlN"),
        (("model.diffusion_model.out.2.weight", "first_stage_model.x"), "a checkpoint, a whole"),
        (("conditioner.embedders.0.x.weight",), "a checkpoint"),
        (("input_blocks.0.0.weight",), "a diffusion model"),
        (("double_blocks.0.img_attn.qkv.weight",), "a diffusion model"),
        (("diffusion_model.out.2.weight",), "a diffusion model"),
        (("decoder.conv_in.weight", "encoder.conv_in.weight"), "a VAE"),
        (("text_model.encoder.layers.0.mlp.fc1.weight",), "a text encoder"),
        (
            ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight",),
            "a motion module",
        ),
        (("bundle_emb.cat.string_to_param.*",), "embeddings alone"),
        (("bundle_emb.cat.clip_g", "bundle_emb.cat.clip_l"), "embeddings alone"),
        (("base_model.model.a.oft_R.weight",), "an OFT as PEFT and OneTrainer"),
        (("lora_unet_a.oft_R.weight", "lora_unet_a.alpha"), "an OFT as PEFT and OneTrainer"),
        (("base_model.model.a.boft_R", "base_model.model.a.boft_s"), "an OFT as PEFT"),
        (("base_model.model.a.vera_lambda_d",), "another adapter of PEFT's"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, keys: tuple[str, ...], said: str):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    with pytest.raises(LoRAFileError, match=rf"^{path} is no LoRA but {said}.*[;,] .*\.$"):
        inspect(path)


def test_what_nobody_knows_is_named_nothing():
    assert other_than_a_lora(["something.else", "bundle.cat"]) == ""
    assert other_than_a_lora(["x" * 10**6] * 10) == ""


@pytest.mark.parametrize(
    "state",
    [
        {"unet.mid_block.attn.to_k.ia3_l": torch.ones(24, 1)},
        {"lora_unet_x.weight": torch.ones(24), "lora_unet_x.on_input": torch.tensor(True)},
    ],
)
def test_an_ia3_is_shown_and_refused_by_all_else(tmp_path: Path, state: dict[str, torch.Tensor]):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(state, path)
    [info], _ = inspect(path)
    assert (info.kind, info.parameters, info.ranked) == ("ia3", 24, False)
    for use in (load, lambda path: resize_file(path, other, Limits()),
                lambda path: merge_files([(path, 1.0)], other, Limits())):  # fmt: skip
        with pytest.raises(
            LoRAFileError, match=rf"^{path} is no LoRA but an IA³.*not read here\.$"
        ):
            use(path)
    assert not other.exists()
