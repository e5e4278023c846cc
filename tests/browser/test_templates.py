"""The templates and nodes as a person sees them, in the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files.component import Component

TWINS = Path(__file__).resolve().parent.parent / "workflows"
TEMPLATES = {
    "1 Train on the demo model": "train_and_sample",
    "2 Train on SDXL": "train_on_sdxl",
    "3 Load a variable-rank LoRA": "load_lora",
    "4 Inspect ranks": "inspect_ranks",
}
# By what front ends from 1.32 to 1.58 call them.
DIALOG = "[role=dialog]:visible"
TOAST = ".p-toast-message, [data-testid=toast]"
READY = "() => window.app?.canvas && window.app.graph && window.app.extensionManager?.setting"
# Where a node is: in Nodes 2.0 as drawn, else as the canvas sees it; left, top, right, bottom.
BOXES = """() => app.graph.nodes.map(node => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  if (!element) {
    const [x, y, width, height] = node.getBounding();
    return [node.id, x, y, x + width, y + height];
  }
  const box = element.getBoundingClientRect(), scale = app.canvas.ds.scale;
  return [node.id, box.left / scale, box.top / scale, box.right / scale, box.bottom / scale];
})"""
# The font in which the table of ranks is shown, once it is.
SHOWN = """() => {
  const holds = element => (element.value ?? element.textContent).includes("Mean rank");
  const found = [...document.querySelectorAll("textarea, pre")].find(holds);
  return found?.checkVisibility() ? getComputedStyle(found).fontFamily.toLowerCase() : "";
}"""
GROUPED = """() => app.graph.nodes.filter(node => !app.graph.groups.some(group => {
  const [x, y, width, height] = node.getBounding(), [left, top] = group.pos;
  return x >= left && y >= top && x + width <= left + group.size[0]
    && y + height <= top + group.size[1];
})).map(node => node.title)"""


class Page:
    """The front end in one mode, and the errors it reported."""

    def __init__(self, browser: Any, server: Any, nodes2: bool) -> None:
        self.server, self.nodes2, self.errors = server, nodes2, []
        # The tour and the news would cover what a test clicks on.
        server.post(
            "/settings",
            {"Comfy.VueNodes.Enabled": nodes2, "Comfy.TutorialCompleted": True},
        )
        context = browser.new_context(viewport={"width": 1920, "height": 1080})
        self.page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.wait_for_function("() => app.graph.nodes.length", timeout=60_000)

    def ask(self, script: str, value: Any = None) -> Any:
        return self.page.evaluate(script, value)

    def browse_templates(self) -> None:
        offered = self.server.get("/api/workflow_templates")
        [pack] = [name for name, found in offered.items() if set(TEMPLATES) <= set(found)]
        if self.page.locator(DIALOG).count() == 0:
            self.page.get_by_text("Templates", exact=True).first.click()
        self.page.locator(DIALOG).get_by_text(pack, exact=True).first.click()

    def pick_template(self, name: str) -> None:
        """Open a template as people do."""
        self.browse_templates()
        self.page.locator(DIALOG).get_by_text(name, exact=True).first.click()
        self._await_template(name)

    def open_template(self, name: str) -> None:
        """As :meth:`pick_template`, without the dialog: its pictures cost more than many a test."""
        from playwright.sync_api import TimeoutError as NotInTime

        offered = self.server.get("/api/workflow_templates")
        [pack] = [key for key, found in offered.items() if set(TEMPLATES) <= set(found)]
        graph = self.server.get(f"/api/workflow_templates/{quote(pack)}/{quote(name)}.json")
        for patience in (5_000, 10_000, 20_000):
            self.ask("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
            # After a reload newer front ends may bring back the workflow of before on top of it.
            with suppress(NotInTime):
                self._await_template(name, patience)
                return
        raise AssertionError(f"{name} does not stay open")

    def _await_template(self, name: str, patience: int = 20_000) -> None:
        nodes = len([n for n in json.loads((TWINS / f"{TEMPLATES[name]}.json").read_text())])
        for _ in range(2):
            self.page.wait_for_function(
                "count => app.graph.nodes.filter(n => n.type !== 'MarkdownNote').length === count",
                arg=nodes,
                timeout=patience,
            )
            self.page.wait_for_timeout(750)  # until Nodes 2.0 has measured itself

    def prompt(self) -> dict[str, Any]:
        """What Run would send."""
        sent = self.ask("async () => JSON.stringify((await app.graphToPrompt()).output)")
        return {
            key: {"class_type": node["class_type"], "inputs": node["inputs"]}
            for key, node in json.loads(sent).items()
        }


@pytest.fixture(scope="module")
def files(server: Any) -> None:
    """The files that the templates name: without them front ends mark the nodes as wrong."""
    [checkpoint] = {_twin(name)["1"]["inputs"].get("ckpt_name") for name in TEMPLATES} - {None}
    (server.output / "checkpoints").mkdir(exist_ok=True)
    (server.output / "checkpoints" / checkpoint).write_bytes(b"")
    for name in TEMPLATES:
        for node in _twin(name).values():
            lora = node["inputs"].get("lora_name", "(")
            if not lora.startswith("("):
                _write_lora(server.output / "loras" / lora)


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def page(request: pytest.FixtureRequest, browser: Any, server: Any, files: None) -> Iterator[Page]:
    opened = Page(browser, server, request.param)
    yield opened
    opened.page.context.close()


def _twin(name: str) -> dict[str, Any]:
    return json.loads((TWINS / f"{TEMPLATES[name]}.json").read_text(encoding="utf-8"))


def test_the_template_browser_shows_all_with_their_pictures(page: Page):
    page.browse_templates()
    dialog = page.page.locator(DIALOG)
    for name in TEMPLATES:
        dialog.get_by_text(name, exact=True).first.wait_for(timeout=10_000)
    drawn = "() => [...document.querySelectorAll('[role=dialog] img')]"
    drawn += ".filter(image => image.naturalWidth > 256)"
    page.page.wait_for_function(f"{drawn[6:]}.length >= 4", timeout=10_000)
    assert page.ask(f"{drawn}.length") == len(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens(page: Page, name: str):
    page.errors.clear()
    page.pick_template(name)
    assert page.page.locator(DIALOG).count() == 0, "something is missing"
    assert page.errors == []
    assert page.ask("() => app.graph.nodes.filter(n => n.has_errors).map(n => n.type)") == []
    assert page.prompt() == _twin(name)
    assert _overlaps(page.ask(BOXES)) == []
    assert page.ask(GROUPED) == [], "nodes outside every group"


def test_ranks_are_shown_in_the_node(page: Page):
    name = "4 Inspect ranks"
    page.open_template(name)
    page.errors.clear()
    page.ask("async () => { await app.queuePrompt(0) }")
    page.page.wait_for_function(f"() => ({SHOWN})()", timeout=30_000)
    assert "mono" in page.ask(SHOWN), "the table's columns need a font of one width"
    assert page.prompt() == _twin(name), "what is shown is no setting"
    assert page.errors == []


def test_a_small_learning_rate_is_shown_and_can_be_typed(page: Page):
    page.open_template("2 Train on SDXL")
    widget = "app.graph.getNodeById(3).widgets.find(w => w.name === 'learning_rate')"
    field = page.page.locator('[data-node-id="3"] [aria-label="learning_rate"] input')
    field = field.or_(page.page.locator('[data-node-id="3"] input[aria-label="learning_rate"]'))
    if not page.nodes2:  # the canvas draws the value with as many decimals as this
        assert page.ask(f"() => {widget}.value.toFixed({widget}.options.precision)") == "0.000100"
        return
    assert float(field.first.input_value()) == 1e-4  # newer front ends add zeros
    field.first.click(force=True)  # in newer front ends under what one drags
    for key in ("Control+a", "Delete"):
        page.page.keyboard.press(key)
    page.page.keyboard.type("0.00005", delay=50)
    page.page.keyboard.press("Tab")
    assert page.ask(f"() => {widget}.value") == pytest.approx(5e-5)


def _overlaps(boxes: list[Any]) -> list[tuple[Any, Any]]:
    return [
        (a[0], b[0])
        for number, a in enumerate(boxes)
        for b in boxes[number + 1 :]
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]


def _write_lora(path: Path) -> None:
    block = "input_blocks.4.1.transformer_blocks.0"
    components = [
        Component(
            f"{block}.{kind}.{layer}",
            torch.ones(rank, 64),
            torch.ones(64, rank),
            torch.ones(rank),
            1.0,
        )
        for kind in ("attn1", "attn2")
        for rank, layer in enumerate(("to_q", "to_k", "to_v", "to_out.0"), 1)
    ]
    lora_file.save(path, components, {})
