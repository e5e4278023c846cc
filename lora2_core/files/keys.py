"""The many ways in which LoRA files name their tensors, told apart by their endings alone.

kohya, diffusers, PEFT and OneTrainer differ in how they write the two factors; LoHa, LoKr, GLoRA,
OFT and plain differences have endings of their own. Needs no torch: keys, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

DOWN, UP = ".lora_down.weight", ".lora_up.weight"
MID, ALPHA, DORA_SCALE, RESHAPE = ".lora_mid.weight", ".alpha", ".dora_scale", ".reshape_weight"
NU = ".lora2_nu"  # of the other layout of LoRA² files; see :mod:`.decode`
# Endings of (down, up) after the component's name; the first that fits is taken.
PAIR_ENDINGS = (
    (DOWN, UP),  # kohya, OneTrainer
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, diffusers
    (".lora_A.default.weight", ".lora_B.default.weight"),  # PEFT with its adapter's name
    ("_lora.down.weight", "_lora.up.weight"),  # old diffusers
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
_OF_OTHERS = (ALPHA, DORA_SCALE)  # that components of other kinds may have, too
_BESIDE = (MID, ALPHA, DORA_SCALE, RESHAPE, NU)  # two factors, in the order of Pair
# A DoRA's magnitudes as PEFT names them.
MAGNITUDES = (
    ".lora_magnitude_vector.default.weight",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector",
)
# AdaLoRA's importances between the two factors, as PEFT names them.
DIAGONALS = (".lora_E", ".lora_E.default", ".lora_E.weight", ".lora_E.default.weight")
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
    "ia3": (".ia3_l", ".ia3_l.default", ".on_input"),  # which ComfyUI does not read
}  # fmt: skip
FACTORS = ("lora", "conv", "dora", "adalora")  # kinds of two factors: those that have ranks to cut
# What a kind is called beside a number, of one and of several.
_CALLED = {
    "loha": ("LoHa", "LoHa"), "lokr": ("LoKr", "LoKr"), "glora": ("GLoRA", "GLoRA"),
    "oft": ("OFT", "OFT"), "boft": ("BOFT", "BOFT"), "ia3": ("IA³", "IA³"),
    "difference": ("difference", "differences"), "norm": ("norm", "norms"),
    "set weight": ("set weight", "set weights"),
    "tensor": ("tensor", "tensors"), "embedding": ("embedding", "embeddings"),
    "module": ("whole module", "whole modules"), "unknown": ("unknown tensor", "unknown tensors"),
}  # fmt: skip
# What is added to a weight or a bias as it is; the first counts where a layer has both.
WEIGHT_DIFFERENCES, BIAS_DIFFERENCES = (".diff", ".w_norm"), (".diff_b", ".b_norm")
SET_WEIGHT = ".set_weight"  # takes the weight's place, whatever the strength
_ALONE = {*WEIGHT_DIFFERENCES, *BIAS_DIFFERENCES, SET_WEIGHT}
# Without these there is nothing to multiply; of each line one set is enough.
_NEEDED = {
    "loha": (({".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"},),),
    "lokr": (
        ({".lokr_w1"}, {".lokr_w1_a", ".lokr_w1_b"}),
        ({".lokr_w2"}, {".lokr_w2_a", ".lokr_w2_b"}),
    ),
    "glora": ((set(OTHER_ENDINGS["glora"]),),),
}
_PREFIXES = ("base_model.model.",)  # that PEFT puts before a component's name
_PAIR_OF = {end: ends for ends in PAIR_ENDINGS for end in ends}
_KIND_OF = {end: kind for kind, ends in OTHER_ENDINGS.items() for end in ends}
_MOST_DOTS = 3  # of an ending; none is the end of another
_BUNDLED, _IN_A1111 = "bundle_emb.", ".string_to_param"
_EMBEDDINGS = {"clip_l", "clip_g", "t5", "emb_params", "text_encoders_0", "text_encoders_1", "*"}
_WHOLE = (".weight", ".bias")  # of a module that was trained as it is
_IN_MODULES = (".default", ".modules_to_save", ".base_layer")  # by PEFT, before that


@dataclass(frozen=True)
class Pair:
    """The keys of one component of two factors; ``name`` is its key without an ending."""

    name: str
    down: str
    up: str
    mid: str | None = None  # a third factor of some convolutions
    alpha: str | None = None
    dora_scale: str | None = None  # magnitudes, by whatever name
    reshape: str | None = None
    nu: str | None = None
    diagonal: str | None = None  # importances of an AdaLoRA

    @property
    def keys(self) -> tuple[str, ...]:
        every = (
            self.down, self.up, self.mid, self.alpha, self.dora_scale, self.reshape, self.nu,
            self.diagonal,
        )  # fmt: skip
        return tuple(key for key in every if key is not None)


@dataclass(frozen=True)
class Loose:
    """Whole tensors that no component has a place for, by what they are together.

    ``kind``: "embedding" (of a word), "module" (saved as it is: PEFT's ``modules_to_save`` and
    biases), or "unknown".
    """

    kind: str
    name: str  # of the word or the module; empty where it has none
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ParsedKeys:
    """What the keys of a file are."""

    pairs: tuple[Pair, ...]
    others: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """kind → component's name → its keys; an alpha is listed with its component"""
    lonely: tuple[str, ...] = ()  # factors without the others that they are multiplied with
    unknown: tuple[str, ...] = ()  # no ending that is known

    def components(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Name and keys of each, whatever its kind."""
        for pair in self.pairs:
            yield pair.name, pair.keys
        for components in self.others.values():
            yield from components.items()

    def changes(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        """What changes a weight by itself: a component's name, whether it is the layer's bias that
        changes, and the keys that do it together."""
        for name, keys in self.components():
            ends = {key: key[len(name) :] for key in keys}
            alone = {key for key, end in ends.items() if end in _ALONE}
            for key in sorted(alone):
                yield name, ends[key] in BIAS_DIFFERENCES, (key,)
            together = tuple(key for key in keys if key not in alone)
            if any(ends[key] not in _OF_OTHERS for key in together):
                yield name, False, together

    @property
    def names(self) -> list[str]:
        """Of all components."""
        return [name for name, _ in self.components()]

    @cached_property
    def loose(self) -> tuple[Loose, ...]:
        """Of :attr:`unknown` what means the same without the components beside it."""
        pairs, found = {pair.name for pair in self.pairs}, dict[tuple[str, str], list[str]]()
        for key in self.unknown:
            kind, name = _loose(key)
            alone = name in pairs or not any(before in pairs for before in _before(key))
            if alone and not key.endswith(_OF_OTHERS):
                found.setdefault((kind, plain_name(name)), []).append(key)
        return tuple(Loose(*what, tuple(keys)) for what, keys in found.items())

    @cached_property
    def strays(self) -> tuple[str, ...]:
        """The rest of it: of a component in a way that nobody here knows, or of nothing."""
        placed = {key for one in self.loose for key in one.keys}
        return tuple(key for key in self.unknown if key not in placed)


def parse_keys(keys: Iterable[str]) -> ParsedKeys:
    """Group the keys of a file by component, in the order of the file.

    Files keep the result beside their keys (:attr:`.header.Header.parsed`,
    :attr:`.read.LoRAFile.parsed`): with hundreds of components this takes milliseconds.
    """
    present = {key: key for key in keys}
    pairs: list[Pair] = []
    others: dict[str, dict[str, list[str]]] = {}
    lonely: list[str] = []
    taken: set[str] = set()
    for key in present:
        if key in taken:
            continue
        end = _ending(key)
        name = key[: len(key) - len(end)]
        if end in _PAIR_OF and (pair := _pair(name, *_PAIR_OF[end], present)) is not None:
            pairs.append(pair)
            taken.update(pair.keys)
        elif end in _KIND_OF:
            others.setdefault(_KIND_OF[end], {}).setdefault(name, []).append(key)
            taken.add(key)
        elif end in _PAIR_OF:
            lonely.append(key)
            taken.add(key)
    lonely += [key for key in present if key not in taken and key.endswith(MID)]
    for kind, components in others.items():
        for name in [n for n, ours in components.items() if not _complete(kind, n, ours)]:
            lonely += components.pop(name)
        for name, ours in components.items():
            ends = (ALPHA, DORA_SCALE, ".weight") if name + ".on_input" in ours else _OF_OTHERS
            extra = [name + end for end in ends if name + end in present]
            ours += [key for key in extra if key not in taken]
            taken.update(extra)
    taken.update(lonely)
    unknown = tuple(key for key in present if key not in taken)
    complete = {
        kind: {name: tuple(ours) for name, ours in components.items()}
        for kind, components in others.items()
        if components
    }
    return ParsedKeys(tuple(pairs), complete, tuple(lonely), unknown)


def plain_name(name: str) -> str:
    """A component's name without what a trainer's framework puts before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def counted(count: int, kind: str) -> str:
    """``258 differences``, ``1 LoKr``; kinds with no name of their own as they are."""
    one, several = _CALLED.get(kind, (kind, kind))
    return f"{count} {one if count == 1 else several}"


def _loose(key: str) -> tuple[str, str]:
    """Kind and name of a :class:`Loose`."""
    if key.startswith(_BUNDLED):
        rest = key.removeprefix(_BUNDLED)
        name = rest.partition(_IN_A1111)[0] if _IN_A1111 in rest else rest.rpartition(".")[0]
        return "embedding", name or rest
    if key in _EMBEDDINGS or key.startswith("string_to_param"):
        return "embedding", ""
    if key.startswith("<") and key.endswith(">"):
        return "embedding", key
    name, dot, end = key.rpartition(".")
    if not name or dot + end not in _WHOLE:
        return "unknown", ""
    for part in _IN_MODULES:
        name = name.removesuffix(part)
    return "module", name


def _before(key: str) -> Iterator[str]:
    """What a component may be called that ``key`` is of: it without its last parts."""
    for _ in range(_MOST_DOTS + 2):
        key, dot, _ = key.rpartition(".")
        if not dot:
            return
        yield key


def _ending(key: str) -> str:
    """The ending of a key that tells what it is; empty when none is known."""
    place = len(key)
    for _ in range(_MOST_DOTS):
        place = key.rfind(".", 0, place)
        if place < 0:
            return ""
        end = key[place:]
        if end in _PAIR_OF or end in _KIND_OF:
            return end
        if key.endswith("_lora", 0, place) and "_lora" + end in _PAIR_OF:
            return "_lora" + end
    return ""


def _pair(name: str, down: str, up: str, present: Mapping[str, str]) -> Pair | None:
    """The component of two factors with these endings, if both are there."""
    if name + down not in present or name + up not in present:
        return None
    mid, alpha, dora_scale, reshape, nu = (present.get(name + end) for end in _BESIDE)
    dora_scale = dora_scale or _first(name, MAGNITUDES, present)
    diagonal = _first(name, DIAGONALS, present)
    return Pair(name, name + down, name + up, mid, alpha, dora_scale, reshape, nu, diagonal)


def _first(name: str, ends: Iterable[str], present: Mapping[str, str]) -> str | None:
    return next((present[name + end] for end in ends if name + end in present), None)


def _complete(kind: str, name: str, keys: Iterable[str]) -> bool:
    ends = {key[len(name) :] for key in keys}
    if (".hada_t1" in ends) != (".hada_t2" in ends):
        return False
    return all(any(one <= ends for one in enough) for enough in _NEEDED.get(kind, ()))
