"""Small networks of the paper's judges' build with seeded weights, as transformers stores them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["a", "sks", "mug", "on", "the", "beach", "in", "snow"]


def make_dino(folder: Path) -> Path:
    """A ViT without anything behind the class token, as DINO's is."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=64, patch_size=16, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """A CLIP that reads 16 tokens, with the words of WORDS."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**small, "intermediate_size": 64, "vocab_size": tokens,
                     "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model = CLIPModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> int:
    from transformers import CLIPTokenizer

    words = [f"{word}</w>" for word in WORDS]
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), *words]
    tokens = list(dict.fromkeys(tokens))
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({one: place for place, one in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    CLIPTokenizer(str(vocabulary), str(merges)).save_pretrained(folder)
    return len(tokens)
