"""The many ways in which LoRA files name their tensors, told apart by their endings alone.

kohya, diffusers, PEFT and OneTrainer differ in how they write the two factors; LoHa, LoKr, GLoRA,
OFT and plain differences have endings of their own. Needs no torch: keys, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# Endings of (down, up) after the component's name; the first that fits is taken.
PAIR_ENDINGS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya, OneTrainer
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, diffusers
    (".lora_A.default.weight", ".lora_B.default.weight"),  # PEFT with its adapter's name
    ("_lora.down.weight", "_lora.up.weight"),  # old diffusers
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
MID, ALPHA, DORA_SCALE, RESHAPE = ".lora_mid.weight", ".alpha", ".dora_scale", ".reshape_weight"
NU = ".lora2_nu"  # of the other layout of LoRA² files; see foreign_lora2
# Of other kinds than two factors: what is left of the key is the component's name.
OTHER_ENDINGS = {
    "loha": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "lokr": (
        ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2",
    ),
    "glora": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "oft": (".oft_blocks", ".oft_diag", ".rescale"),
    "difference": (".diff", ".diff_b", ".set_weight"),
    "norm": (".w_norm", ".b_norm"),
}  # fmt: skip
_PREFIXES = ("base_model.model.",)  # that PEFT puts before a component's name


@dataclass(frozen=True)
class Pair:
    """The keys of one component of two factors; ``name`` is its key without an ending."""

    name: str
    down: str
    up: str
    mid: str | None = None  # a third factor of some convolutions
    alpha: str | None = None
    dora_scale: str | None = None
    reshape: str | None = None
    nu: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        every = (
            self.down, self.up, self.mid, self.alpha, self.dora_scale, self.reshape, self.nu,
        )  # fmt: skip
        return tuple(key for key in every if key is not None)


@dataclass(frozen=True)
class Parts:
    """What the keys of a file are."""

    pairs: tuple[Pair, ...]
    others: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """kind → component's name → its keys; an alpha is listed with its component"""
    lonely: tuple[str, ...] = ()  # one factor without the other
    unknown: tuple[str, ...] = ()  # no ending that is known


def split(keys: Iterable[str]) -> Parts:
    """Group the keys of a file by component, in the order of the file."""
    present = dict.fromkeys(keys)
    pairs: list[Pair] = []
    others: dict[str, dict[str, list[str]]] = {}
    lonely: list[str] = []
    taken: set[str] = set()
    for key in present:
        if key in taken:
            continue
        if (pair := _pair_of(key, present)) is not None:
            pairs.append(pair)
            taken.update(pair.keys)
        elif (other := _other_of(key)) is not None:
            others.setdefault(other[0], {}).setdefault(other[1], []).append(key)
            taken.add(key)
        elif _is_factor(key):
            lonely.append(key)
            taken.add(key)
    for components in others.values():
        for name, found in components.items():
            extra = [name + end for end in (ALPHA, DORA_SCALE) if name + end in present]
            found += [key for key in extra if key not in taken]
            taken.update(extra)
    unknown = tuple(key for key in present if key not in taken)
    frozen = {kind: {n: tuple(k) for n, k in found.items()} for kind, found in others.items()}
    return Parts(tuple(pairs), frozen, tuple(lonely), unknown)


def plain_name(name: str) -> str:
    """A component's name without what a trainer's framework puts before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _pair_of(key: str, present: dict[str, None]) -> Pair | None:
    """The pair that ``key`` is one factor of, if both are there."""
    for down, up in PAIR_ENDINGS:
        for end in (down, up):
            if not key.endswith(end):
                continue
            name = key[: -len(end)]
            if name + down not in present or name + up not in present:
                continue
            extras = (name + e for e in (MID, ALPHA, DORA_SCALE, RESHAPE, NU))
            return Pair(
                name, name + down, name + up, *(e if e in present else None for e in extras)
            )
    return None


def _other_of(key: str) -> tuple[str, str] | None:
    for kind, endings in OTHER_ENDINGS.items():
        for end in endings:
            if key.endswith(end):
                return kind, key[: -len(end)]
    return None


def _is_factor(key: str) -> bool:
    return any(key.endswith(end) for ends in PAIR_ENDINGS for end in ends)
