"""The templates: each agrees with its API twin, and each twin runs on the booted server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.tests.server.graphs import changed, quick, twin
from lora2_pack.tests.server.studio import Studio

TEMPLATES = Path(__file__).resolve().parents[2] / "workflows"
TWIN_OF = {
    "1 Train on the demo model": "train_and_sample",
    "2 Train on SDXL": "train_on_sdxl",
    "3 Load a variable-rank LoRA": "load_lora",
    "4 Inspect ranks": "inspect_ranks",
}
NOTES = {"MarkdownNote"}


def test_every_template_has_a_twin_and_a_thumbnail():
    assert {path.stem for path in TEMPLATES.glob("*.json")} == set(TWIN_OF)
    assert {path.stem for path in TEMPLATES.glob("*.jpg")} == set(TWIN_OF)


def test_the_server_offers_and_serves_every_template(studio: Studio):
    offered = studio.server.get("/api/workflow_templates")
    [names] = [names for names in offered.values() if set(TWIN_OF) <= set(names)]
    assert set(names) == set(TWIN_OF)
    [pack] = [pack for pack, found in offered.items() if found is names]
    for name in TWIN_OF:
        address = f"/api/workflow_templates/{pack}/{name}".replace(" ", "%20")
        assert json.loads(studio.server.fetch(f"{address}.json")) == _template(name)
        assert studio.server.fetch(f"{address}.jpg")[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", TWIN_OF)
def test_a_template_and_its_twin_agree(studio: Studio, name: str):
    assert _as_api(_template(name), studio.server.get("/object_info")) == twin(TWIN_OF[name])


@pytest.mark.parametrize("name", TWIN_OF)
def test_no_node_of_a_template_covers_another(name: str):
    boxes = {node["id"]: _box(node) for node in _template(name)["nodes"]}
    for one, a in boxes.items():
        for other, b in boxes.items():
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert one >= other or apart, f"{name}: node {one} covers node {other}"


@pytest.fixture(scope="module")
def demo(studio: Studio) -> dict[str, Any]:
    return studio.run(quick(twin("train_and_sample")))


@pytest.fixture(scope="module")
def checkpoint(studio: Studio) -> str:
    """The demo model as a checkpoint by the name that the workflows ask for."""
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    save = {"filename_prefix": "checkpoints/tiny", **inputs}
    studio.run(
        {
            "1": {"class_type": "LoRA2DemoModel", "inputs": {}},
            "2": {"class_type": "CheckpointSave", "inputs": save},
        }
    )
    name = twin("load_lora")["1"]["inputs"]["ckpt_name"]
    folder = studio.server.output / "checkpoints"
    next(folder.glob("tiny_*")).rename(folder / name)
    return name


@pytest.fixture(scope="module")
def sdxl(studio: Studio, checkpoint: str) -> dict[str, Any]:
    return studio.run(quick(twin("train_on_sdxl")))


@pytest.mark.parametrize("trained", ["demo", "sdxl"])
def test_train_and_paint(studio: Studio, request: pytest.FixtureRequest, trained: str):
    history = request.getfixturevalue(trained)
    with_lora, base = studio.picture(history, "9"), studio.picture(history, "14")
    assert with_lora.shape == base.shape == (128, 128, 3)
    assert (with_lora != base).any(), "the LoRA changes nothing"
    assert studio.picture(history, "11").shape[1] == 1280
    assert studio.picture(history, "3").shape[1] == 1280
    [text] = studio.server.outputs(history, "10")["text"]
    assert "Mean rank" in text and "cross-attention" in text.lower()


def test_paint_with_the_loaded_file(studio: Studio, sdxl: dict[str, Any]):
    again = quick(twin("load_lora"))
    text = twin("train_on_sdxl")["4"]["inputs"]["text"]
    assert again["3"]["inputs"]["text"] == text, "the two workflows paint the same picture"
    loaded = studio.picture(studio.run(again), "8")
    assert abs(loaded - studio.picture(sdxl, "9")).max() <= 1


def test_inspect_the_file(studio: Studio, demo: dict[str, Any]):
    history = studio.run(twin("inspect_ranks"))
    assert studio.picture(history, "1").shape[1] == 1280
    [text] = studio.server.outputs(history, "1")["text"]
    connected = studio.server.outputs(demo, "10")["text"][0]
    assert text.split("\n")[2:] == connected.split("\n")[2:]  # its name is told with its folder


def test_a_replaced_file_is_inspected_anew(studio: Studio, demo: dict[str, Any]):
    workflow = twin("inspect_ranks")
    name = "tests/replaced.safetensors"
    original = studio.loras / workflow["1"]["inputs"]["lora_name"]
    workflow = changed(workflow, "1", lora_name=name)
    (studio.loras / name).parent.mkdir(exist_ok=True)
    texts = []
    for rank in (8, 1):
        state = lora_file.truncate(lora_file.load(original).state, rank)
        (studio.loras / name).write_bytes(lora_file.encode(state, {}))
        texts += studio.server.outputs(studio.run(workflow), "1")["text"]
    assert "highest 1\n" not in texts[0] and "highest 1\n" in texts[1]


def test_inspecting_nothing_says_what_to_do(studio: Studio):
    error = studio.refusal(changed(twin("inspect_ranks"), "1", lora_name="(the connected LORA2)"))
    assert "lora_name is empty" in error.message


def _template(name: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))


def _as_api(graph: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What the front end would send for a saved graph: classes, widget values and links."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, info, sources)}
        for node in graph["nodes"]
        if node["type"] not in NOTES
    }


def _inputs(node: dict[str, Any], info: dict[str, Any], sources: dict[int, Any]) -> dict[str, Any]:
    spec = info[node["type"]]["input"]
    values = iter(node.get("widgets_values") or ())
    out: dict[str, Any] = {}
    for name, (kind, *options) in {**spec["required"], **spec.get("optional", {})}.items():
        options = options[0] if options else {}
        if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")):
            continue
        if options.get("forceInput"):
            continue
        out[name] = next(values)
        if options.get("control_after_generate"):
            next(values)
    assert list(values) == [], f"{node['type']} holds more values than it has widgets"
    for slot in node["inputs"]:
        if slot.get("link") is not None:
            out[slot["name"]] = sources[slot["link"]]
    return out


def _box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, with the title bar of 30 px above the position."""
    (x, y), (width, height) = node["pos"], node["size"]
    if node["flags"].get("collapsed"):
        width, height = 140, 0
    return x, y - 30, x + width, y + height


def test_other_words_find_our_nodes(studio: Studio):
    """Where ComfyUI has such words (0.33 has, 0.3.75 has not)."""
    nodes = studio.server.get("/object_info")
    if not any(node.get("search_aliases") for node in nodes.values()):
        pytest.skip("this ComfyUI knows no other words for a node")
    assert "train lora" in nodes["LoRA2Train"]["search_aliases"]
    assert "merge lora" in nodes["LoRA2Merge"]["search_aliases"]
