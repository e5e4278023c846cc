"""Whatever a workflow, a file or a name holds is text in the page: nothing of it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.tests.browser.test_panel import PANEL, TRAIN
from lora2_pack.tests.browser.test_sidebar import JOBS, ROW, _job, _open_tab
from lora2_pack.tests.browser.test_templates import DIALOG, READY, TOAST, Page
from lora2_pack.tests.core.toy import thumbnail
from PIL import Image

IMAGE = "<img src=x onerror=window.__hit=1>"
LINK = "[[here|javascript:window.__hit=1]]"
# Also out of an attribute, out of a comment or text, and as what has been escaped already.
PLANTED = f"""{IMAGE} {LINK} "'-->`</textarea><svg/onload=window.__hit=1> &lt;b&gt; a<b & c"""
FILE = f"{IMAGE} &lt;b&gt; '{LINK}'.safetensors"
NOTES = "[data-testid=lora2-notes]"
FOREIGN = [
    "javascript:window.__hit=1",
    "data:text/html,<script>window.__hit=1;opener.__hit=1</script>",
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' onload='window.__hit=1'/>",
    f'x" onerror="window.__hit=1" {IMAGE}',
]
# Where a widget of the first node of a kind lies in the window.
SPOT = """([kind, name]) => {
  const node = app.graph.nodes.find(node => node.type === kind), { ds, canvas } = app.canvas;
  ds.scale = 1;
  ds.offset[0] = 500 - node.pos[0];
  ds.offset[1] = 300 - node.pos[1];
  app.canvas.setDirty(true, true);
  const y = node.widgets.find(widget => widget.name === name).last_y + 10;
  const box = canvas.getBoundingClientRect();
  return [box.left + 500 + node.size[0] / 2, box.top + 300 + y];
}"""
# Not by the callbacks of widgets: behind those, Nodes 2.0 of front end 1.32 shows no part of a node
# that comes later.
SET = """([kind, values]) => {
  const node = app.graph.nodes.find(node => node.type === kind);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find(widget => widget.name === name);
    widget.value = value;
  }
  node.onConfigure?.(node.serialize());
}"""
TIP = """async ([path, text]) => {
  const { Tip } = await import(path);
  new Tip(document.body).show(text, text, `${text}.`, { left: 0, right: 9, top: 400, bottom: 409 });
}"""
TEXTS = "within => [...document.querySelectorAll(within)].map(e => e.innerText + e.title)"
FOUND = f"([within, text]) => ({TEXTS})(within).some(shown => shown.includes(text))"
SECONDS = 20_000
LINKS = """() => [...document.querySelectorAll('a')].map(a => a.href)
  .filter(href => !/^(https?|blob):|^$/.test(href))"""


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def opened(request: pytest.FixtureRequest, browser: Any, server: Any) -> Iterator[Page]:
    page = Page(browser, server, request.param)
    yield page
    page.page.context.close()


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page, in which nothing of what is planted may run, or could by a click."""
    opened.ask("() => { delete window.__hit }")
    yield opened
    opened.page.wait_for_timeout(500)  # a broken picture takes a moment to say so
    assert opened.ask("() => window.__hit ?? null") is None
    assert opened.ask(LINKS) == []
    while opened.page.locator(DIALOG).count():
        opened.page.keyboard.press("Escape")
        opened.page.locator(DIALOG).last.wait_for(state="hidden")


@pytest.fixture
def told(page: Page, server: Any) -> Iterator[Any]:
    """Lets the server tell of a training whatever a test wants."""
    routes: list[str] = []

    def tell(path: str, answer: Any) -> None:
        routes.append(path)
        page.page.route(path, lambda route: route.fulfill(json=answer))

    yield tell
    for path in routes:
        page.page.unroute(path)


def _shows(page: Page, text: str, within: str = "body") -> None:
    """The text is there for people, letter by letter."""
    try:
        page.page.wait_for_function(FOUND, arg=[within, text], timeout=SECONDS)
    except Exception:
        shown = page.ask(TEXTS, within)
        raise AssertionError(f"{text!r} is not in {shown!r}") from None


def _shows_error(page: Page, *texts: str) -> None:
    """One of the texts of an error is there, in newer front ends behind a button."""
    told = f"([within, texts]) => texts.some(text => ({FOUND})([within, text]))"
    arguments = ["body", [*texts, "View details"]]
    page.page.wait_for_function(told, arg=arguments, timeout=SECONDS)
    for button in page.page.get_by_text("View details").all():
        button.click()
    page.page.wait_for_function(told, arg=["body", list(texts)], timeout=SECONDS)


def test_a_note_is_text_for_the_page_that_asked(page: Page, browser: Any, server: Any):
    other = Page(browser, server, page.nodes2)
    for each in (page, other):
        each.open_template("1 Train on the demo model")
    # The images of the class lack their prompt: refused after the note, before anything is learnt.
    page.ask(
        f"""() => {{
          const node = {TRAIN}, images = app.graph.nodes.find(n => n.type === 'LoRA2ImageFolder');
          images.connect(0, node, node.findInputSlot('class_images'));
        }}"""
    )
    page.ask(SET, ["LoRA2Train", {"preset": "12 GB", "targets": f"{PLANTED}\nand more"}])
    page.ask("async () => { await app.queuePrompt(0) }")
    _shows(
        page,
        f"targets attention (not {PLANTED}\nand more)",
        NOTES,
    )
    _shows_error(page, "class_images is connected")
    other.page.wait_for_timeout(500)
    assert other.page.locator(NOTES).count() == 0
    assert other.ask(f"() => {TRAIN}.widgets.filter(w => w.name.includes('text')).length") == 0
    assert other.ask("() => window.__hit ?? null") is None
    other.page.context.close()


def test_what_a_folder_leaves_out_is_text_and_goes_when_nothing_is(page: Page, server: Any):
    folder = server.input / f"left out {page.nodes2}"
    folder.mkdir()
    planted = folder / f"{IMAGE.replace('/', '')}.psd"
    planted.write_bytes(b"8BPS")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    page.open_template("1 Train on the demo model")
    # Refused right after the folder is read.
    page.ask(SET, ["LoRA2ImageFolder", {"path": folder.name}])
    page.ask(SET, ["LoRA2Train", {"targets": "(", "resolution": 64}])
    page.ask("async () => { await app.queuePrompt(0) }")
    _shows(page, f"Left out: {planted.name} (not read; save it as PNG).", NOTES)
    planted.unlink()
    page.ask("async () => { await app.queuePrompt(0) }")
    page.page.wait_for_function(f"() => !document.querySelector('{NOTES}')", timeout=SECONDS)


@pytest.mark.parametrize("opened", [True], ids=["nodes 2.0"], indirect=True)
def test_an_error_of_a_node_is_text(page: Page):
    page.open_template("1 Train on the demo model")
    page.ask(SET, ["LoRA2Train", {"preset": "as set above", "targets": IMAGE, "resolution": 64}])
    page.ask("async () => { await app.queuePrompt(0) }")
    _shows_error(page, f"targets '{IMAGE}' matches no layer")


@pytest.mark.parametrize("opened", [False], ids=["classic"], indirect=True)
def test_a_name_that_is_not_in_the_list_is_text(page: Page, server: Any):
    # Front end 1.58 runs no workflow that has named a missing file.
    (server.output / "loras" / "lora2").mkdir(parents=True, exist_ok=True)
    _write_lora(server.output / "loras" / "lora2" / "demo_robot_00001_.safetensors", thumbnail())
    page.page.reload()
    page.page.wait_for_function(READY, timeout=60_000)
    page.open_template("4 Inspect ranks")
    page.ask(SET, ["LoRA2InspectRanks", {"lora_name": PLANTED}])
    page.ask("async () => { await app.queuePrompt(0).catch(() => {}) }")
    _shows_error(page, IMAGE, "Inspect Ranks - lora_name")  # newer ones name the input alone


def test_what_a_file_says_of_itself_is_text(page: Page, server: Any):
    _write_lora(server.output / "loras" / FILE, thumbnail())
    page.page.reload()
    page.page.wait_for_function(READY, timeout=60_000)
    page.open_template("4 Inspect ranks")
    _open_list(page, "LoRA2InspectRanks", "lora_name")
    _shows(page, FILE)
    page.page.keyboard.press("Escape")
    page.ask(SET, ["LoRA2InspectRanks", {"lora_name": FILE}])
    _shows(page, f"“{PLANTED}”", ".lora2-panel .lora2-name")
    page.ask("async () => { await app.queuePrompt(0) }")
    _shows(page, PLANTED, "pre")
    assert FILE in page.page.locator("pre", has_text="Mean rank").inner_text()
    (server.output / "loras" / FILE).unlink()


@pytest.mark.parametrize("opened", [True], ids=["nodes 2.0"], indirect=True)
def test_the_help_is_text(page: Page, server: Any):
    _write_lora(server.output / "loras" / FILE, thumbnail())
    page.page.reload()
    page.page.wait_for_function(READY, timeout=60_000)
    page.open_template("4 Inspect ranks")
    page.ask(
        "() => { const n = app.graph.nodes.find(n => n.type === 'LoRA2InspectRanks');"
        f" n.title = {IMAGE!r}; app.canvas.selectItems([n]); }}"
    )
    page.page.get_by_test_id("info-button").first.click()
    page.page.locator(".node-help-content").get_by_text("lora_name").first.wait_for()
    (server.output / "loras" / FILE).unlink()


@pytest.mark.parametrize("opened", [True], ids=["nodes 2.0"], indirect=True)
@pytest.mark.parametrize("picture", FOREIGN)
def test_a_picture_that_is_none_is_not_followed(page: Page, told: Any, picture: str):
    name = "4 Inspect ranks"
    file = {"name": PLANTED, "bytes": 1000, "mean_rank": 2.0, "trigger": PLANTED}
    told("**/api/lora2/inspect*", {**file, "thumbnail": picture, "components": _components()})
    page.open_template(name)
    page.ask(SET, ["LoRA2InspectRanks", {"lora_name": PLANTED}])
    _shows(page, f"“{PLANTED}”", ".lora2-panel .lora2-name")
    source = page.page.locator(".lora2-thumb").first.get_attribute("src")
    assert source and source.startswith(("/", "http"))


def test_the_panel_the_tab_toasts_and_tips_show_text(page: Page, server: Any, told: Any):
    texts = {"name": PLANTED, "message": PLANTED, "file": FILE, "samples": 1}
    job = _job(1, state="running", **texts)
    samples = [{"step": 4, "prompts": [PLANTED] * len(FOREIGN), "urls": FOREIGN}]
    curves = ("steps", "loss", "smoothed", "mean_rank", "probe_steps", "probe_loss")
    empty: dict[str, list[Any]] = {name: [] for name in curves}
    whole = {"history": empty, "components": _components(), "samples": samples, "log": [PLANTED]}
    file = {"name": FILE, "bytes": 1000, "mean_rank": 2.0, "trigger": PLANTED, "components": []}
    told(JOBS, {"jobs": [job]})
    told("**/api/lora2/jobs/job-2", {**job, **whole, "id": "job-2"})
    told("**/api/lora2/inspect*", {**file, "thumbnail": FOREIGN[2]})
    page.page.reload()
    page.page.wait_for_function(READY, timeout=60_000)
    page.open_template("1 Train on the demo model")
    page.ask(f"() => {{ {TRAIN}.widgets.find(w => w.name === 'file_name').value = '%x%'; }}")
    node = page.ask(f"() => String({TRAIN}.id)")
    _open_tab(page)
    for state, more in (("running", {}), ("failed", {"error": PLANTED}), ("finished", {})):
        told_job = {**job, "id": "job-2", "node_id": node, "state": state, **more}
        told(JOBS, {"jobs": [job, told_job]})  # the tab asks again when one has failed
        page.ask(
            "job => app.api.dispatchCustomEvent('lora2.progress', { job, points: [], sample: 4 })",
            told_job,
        )
        for where in (PANEL, f"{ROW} .lora2-job-name", ".lora2-job-message"):
            if state != "finished" or "message" not in where:
                _shows(page, PLANTED, where)
        if state == "failed":
            _shows(page, f"Training {PLANTED} failed", TOAST)
    _shows(page, PLANTED, f"{ROW} dd")
    [main] = [path for path in server.get("/extensions") if path.endswith("lora2/main.js")]
    page.ask(TIP, [main.replace("main.js", "lib/tip.mjs"), PLANTED])
    _shows(page, PLANTED, ".lora2-tip")
    page.ask("() => document.querySelector('.lora2-tip').remove()")


# --- what they share ---------------------------------------------------------------------------


def _open_list(page: Page, kind: str, name: str) -> None:
    spot = page.ask(SPOT, [kind, name])
    page.page.wait_for_timeout(500)
    if page.nodes2:
        page.page.locator(f'[aria-label="{name}"]').first.click()
    else:
        page.page.mouse.click(*spot)


def _components() -> list[dict[str, Any]]:
    place = {"module": f"lora_unet_{IMAGE}", "label": IMAGE, "row": IMAGE, "column": "attn1.q"}
    return [{**place, "rank": 2, "max_rank": 4, "nu": 0.5, "bytes": 100}]


def _write_lora(path: Path, picture: str) -> None:
    block = "input_blocks.4.1.transformer_blocks.0.attn1"
    components = [
        Component(f"{block}.to_q", torch.ones(2, 64), torch.ones(64, 2), torch.ones(2), 1.0)
    ]
    names = ("title", "author", "description", "license", "tags", "trigger_phrase", "usage_hint")
    metadata = {f"modelspec.{name}": PLANTED for name in names}
    lora_file.save(path, components, {**metadata, "modelspec.thumbnail": picture})
