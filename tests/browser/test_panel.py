"""A training as it shows itself in its node, in the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.tests.browser.test_templates import READY, TEMPLATES, TOAST, Page
from lora2_pack.tests.core.toy import thumbnail
from lora2_pack.tests.server.graphs import Workflow, changed, quick, twin

TEMPLATE = "1 Train on the demo model"
SECONDS = 120_000
PANEL, CURVE, MAP = (f"[data-testid=lora2-{name}]" for name in ("panel", "curve", "heatmap"))
TRAIN = "app.graph.nodes.find(n => n.type === 'LoRA2Train')"
# The panel of this state as the view's middle, for the pictures that a person looks at.
SHOW = f"""() => {{
  const node = {TRAIN}, {{ ds, canvas }} = app.canvas;
  ds.scale = 0.8;
  ds.offset[0] = canvas.clientWidth / 2 / ds.scale - node.pos[0] - node.size[0] / 2;
  ds.offset[1] = (canvas.clientHeight - 20) / ds.scale - node.pos[1] - node.size[1];
  app.canvas.setDirty(true, true);
}}"""
POINTS = f"() => Number(document.querySelector('{CURVE}')?.dataset.points ?? 0)"
STEP = f"() => Number(document.querySelector('{PANEL} [role=progressbar]').ariaValueNow)"
HISTORY = """async id => (await (await fetch(`/api/lora2/jobs/${id}`)).json()).history"""
COLOURS = f"""() => {{
  const canvas = document.querySelector('{MAP}');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3]) found.add(data[i] * 256 + data[i + 2]);
  return found.size;
}}"""


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def page(request: pytest.FixtureRequest, browser: Any, server: Any) -> Iterator[Page]:
    opened = Page(browser, server, request.param)
    yield opened
    opened.page.context.close()


@pytest.fixture(scope="module")
def finished(page: Page, server: Any) -> tuple[str, float]:
    """A training of six steps that the page shows at its end, and the node's height before it."""
    page.open_template(TEMPLATE)
    height = page.ask(f"() => {TRAIN}.size[1]")
    job_id = _run(page, server, "whole", steps=6)
    page.page.locator(f'{PANEL}[data-job-state="finished"]').wait_for(timeout=SECONDS)
    page.page.wait_for_timeout(500)
    return job_id, height


@pytest.fixture(autouse=True)
def no_errors(page: Page, server: Any) -> Iterator[None]:
    """No test may leave an error in the page, nor a training at work for the next."""
    page.errors.clear()
    yield
    for job in server.get("/lora2/jobs")["jobs"]:
        if job["state"] in ("queued", "running", "paused"):
            server.post(f"/lora2/jobs/{job['id']}/cancel")
    _until(lambda: all(j["state"] not in ("running", "paused") for j in _jobs(server)))
    assert page.errors == []


@pytest.fixture
def picture(page: Page, tmp_path: Path) -> Any:
    """Keeps what the page looks like."""
    folder = Path(os.environ.get("LORA2_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "nodes2" if page.nodes2 else "classic"

    def keep(name: str, node: str = "LoRA2Train") -> None:
        page.ask(SHOW.replace("LoRA2Train", node))
        page.page.wait_for_timeout(600)
        page.page.screenshot(path=folder / f"panel-{kind}-{name}.png")

    return keep


def test_a_training_shows_itself_while_a_prompt_is_painted(page: Page, server: Any, picture: Any):
    job_id = _start(page, server, "alive", steps=4000)
    page.page.wait_for_function(f"{POINTS[6:]} > 4", timeout=SECONDS)
    told = server.get(f"/lora2/jobs/{job_id}")
    assert page.page.locator(MAP).get_attribute("data-cells") == str(len(told["components"]))
    picture("running")

    painted = server.wait(server.submit(_painting()))
    assert server.outputs(painted, "9")["images"]
    assert _job(server, job_id)["state"] == "running"
    before = page.ask(POINTS)
    page.page.wait_for_function(f"old => {POINTS[6:]} > old", arg=before, timeout=SECONDS)
    assert page.ask(COLOURS) > 4, "a map of ranks has colours"

    earlier = page.ask(HISTORY, job_id)
    _reload(page)
    panel = page.page.locator(f'{PANEL}[data-job-id="{job_id}"]')
    panel.wait_for(state="attached", timeout=SECONDS)
    page.ask(SHOW)  # newer front ends open it elsewhere, and out of sight nothing is drawn
    page.page.wait_for_function(f"old => {POINTS[6:]} >= old", arg=before, timeout=SECONDS)
    later = page.ask(HISTORY, job_id)
    count = len(earlier["steps"])
    assert count >= before
    assert {name: values[:count] for name, values in later.items() if "probe" not in name} == {
        name: values for name, values in earlier.items() if "probe" not in name
    }
    _stop_and_keep(page, server, job_id, picture)


@pytest.mark.parametrize("page", [True], ids=["nodes 2.0"], indirect=True)
def test_pause_stops_within_one_step(page: Page, server: Any, picture: Any):
    job_id = _start(page, server, "paused", steps=4000, yield_to_prompts=False)
    page.page.wait_for_function(f"{POINTS[6:]} > 2", timeout=SECONDS)
    _press(page, "pause")
    at_click = _job(server, job_id)["step"]
    page.page.locator(f'{PANEL}[data-job-state="paused"]').wait_for(timeout=SECONDS)
    time.sleep(3)
    assert _job(server, job_id)["step"] <= at_click + 1
    stood = page.ask(STEP)
    assert page.page.get_by_test_id("lora2-pause").inner_text() == "Resume"
    picture("paused")
    _press(page, "pause")
    page.page.wait_for_function(f"old => {STEP[6:]} > old", arg=stood, timeout=SECONDS)


@pytest.mark.parametrize("page", [False], ids=["classic"], indirect=True)
def test_a_failed_training_says_why(page: Page, server: Any, picture: Any):
    _start(page, server, "failed", steps=4000, file_name=f"gone_{int(page.nodes2)}/failed")
    page.page.wait_for_function(f"{POINTS[6:]} > 1", timeout=SECONDS)
    folder = server.output / "loras" / f"gone_{int(page.nodes2)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("No folder any more: nothing can be saved here.")
    _press(page, "stop")
    page.page.locator(f'{PANEL}[data-job-state="failed"]').wait_for(timeout=SECONDS)
    assert page.page.locator(f"{PANEL} .lora2-message.lora2-bad").inner_text().strip()
    picture("failed")
    folder.unlink()


# The next three look at one training.


def test_a_finished_training_keeps_its_curve(
    page: Page, server: Any, finished: tuple[str, float], picture: Any
):
    page.page.wait_for_function(f"{POINTS[6:]} === 6", timeout=SECONDS)
    assert not page.page.get_by_test_id("lora2-stop").is_visible()
    assert not page.page.get_by_test_id("lora2-pause").is_visible()
    assert _job(server, finished[0])["file"]
    picture("finished")


def test_the_heat_map_is_read_with_the_keyboard(
    page: Page, server: Any, finished: tuple[str, float], picture: Any
):
    heat = page.page.locator(MAP)
    page.page.wait_for_function(
        f"() => Number(document.querySelector('{MAP}').dataset.cells) > 0", timeout=SECONDS
    )
    assert "arrow keys" in (heat.get_attribute("aria-label") or "")
    page.ask(SHOW)
    heat.focus()
    page.page.keyboard.press("ArrowRight")
    tip = page.page.locator(".lora2-tip")
    first = tip.inner_text()
    page.page.wait_for_timeout(1500)  # the whole training is fetched once more at its end
    assert tip.inner_text().splitlines()[-1] == first.splitlines()[-1], "news took it away"
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowDown")
    second = tip.inner_text()
    told = server.get(f"/lora2/jobs/{finished[0]}")["components"]
    assert first != second
    assert all(any(one["module"] in text for one in told) for text in (first, second))
    assert "rank" in second and "ν" in second and "B" in second
    picture("keyboard")
    page.page.keyboard.press("Escape")
    assert tip.count() == 0


def test_a_copy_has_no_training_and_nothing_is_saved(
    page: Page, finished: tuple[str, float], picture: Any
):
    assert page.page.locator(f'{PANEL}[data-job-id="{finished[0]}"]').count() == 1
    values = page.ask(f"() => {TRAIN}.serialize().widgets_values")
    real = page.ask(f"() => {TRAIN}.widgets.filter(w => w.options?.serialize !== false).length")
    assert len(values) <= real and None not in values
    saved = page.ask(f"() => {TRAIN}.serialize().size[1]")
    assert saved == pytest.approx(finished[1], abs=30), "a saved node has no place for the panel"
    panels = page.page.locator(PANEL).count()
    page.ask(
        f"() => {{ const n = {TRAIN}; app.canvas.selectItems([n]); app.canvas.copyToClipboard();"
        " app.canvas.pasteFromClipboard(); }"
    )
    trained = "app.graph.nodes.filter(n => n.type === 'LoRA2Train')"
    page.page.wait_for_function(f"() => {trained}.length === 2")
    page.page.wait_for_timeout(800)
    assert page.page.locator(PANEL).count() == panels
    page.ask(f"() => app.graph.remove({trained}[1])")
    page.ask(f"() => {TRAIN}.collapse()")
    page.page.wait_for_timeout(500)
    assert not page.page.locator(PANEL).is_visible()
    page.ask(f"() => {TRAIN}.collapse()")
    page.ask(SHOW)
    page.page.locator(PANEL).wait_for()
    _widen(page)
    page.page.wait_for_function(f"() => document.querySelector('{PANEL}').offsetWidth > 600")
    picture("wide")


def test_a_training_in_a_subgraph(page: Page, server: Any):
    page.open_template(TEMPLATE)
    name = f"inside_{int(page.nodes2)}"
    _set(page, file_name=f"panel/{name}", steps=6, run="background")
    page.ask(f"() => {{ app.graph.convertToSubgraph(new Set([{TRAIN}])); }}")
    page.page.wait_for_timeout(500)
    page.ask("async () => { await app.queuePrompt(0) }")
    _until(lambda: any(j["name"].startswith(name) for j in _jobs(server)))
    [job] = [j for j in _jobs(server) if j["name"].startswith(name)]
    assert ":" in job["node_id"]
    page.ask(
        "() => app.canvas.openSubgraph(app.graph.nodes.find(n => n.subgraph).subgraph,"
        " app.graph.nodes.find(n => n.subgraph))"
    )
    panel = page.page.locator(f'{PANEL}[data-job-id="{job["id"]}"]')
    panel.wait_for(state="attached", timeout=SECONDS)
    page.page.locator(f'{PANEL}[data-job-state="finished"]').wait_for(
        state="attached", timeout=SECONDS
    )


def test_the_ranks_of_a_chosen_file_are_shown(page: Page, server: Any, picture: Any):
    name = "4 Inspect ranks"
    file = twin(TEMPLATES[name])["1"]["inputs"]["lora_name"]
    _write_lora(server.output / "loras" / file)
    page.open_template(name)
    page.page.wait_for_function(
        f"() => document.querySelector('{MAP}')?.dataset.cells === '16'", timeout=20_000
    )
    thumb = page.page.locator(".lora2-thumb")
    assert thumb.is_visible() and thumb.get_attribute("alt")
    assert page.ask("() => document.querySelector('.lora2-thumb').naturalWidth") == 32
    assert "“sks robot”" in page.page.locator(".lora2-panel .lora2-name").first.inner_text()
    picture("inspected", "LoRA2InspectRanks")
    assert page.page.locator(MAP).is_visible()
    prompt = page.prompt()
    assert prompt == twin(TEMPLATES[name])


# --- what they share ---------------------------------------------------------------------------


def _start(page: Page, server: Any, name: str, **settings: Any) -> str:
    """Open the template and :func:`_run` it."""
    page.open_template(TEMPLATE)
    return _run(page, server, name, **settings)


def _run(page: Page, server: Any, name: str, **settings: Any) -> str:
    """Queue the graph with a training in the background; the training's id."""
    known = {job["id"] for job in _jobs(server)}
    small: dict[str, Any] = {"resolution": 64, "batch_size": 1, "run": "background"}
    small["seed"] = time.time_ns() % 2**31  # or the run before would be gone on with
    file_name = f"panel/{name}_{int(page.nodes2)}"
    _set(page, **{**small, "file_name": file_name, **settings})
    _close_toasts(page)
    page.page.get_by_test_id("queue-button").first.click()
    _until(lambda: {job["id"] for job in _jobs(server)} - known)
    [job_id] = {job["id"] for job in _jobs(server)} - known
    page.page.locator(f'{PANEL}[data-job-id="{job_id}"]').wait_for(
        state="attached", timeout=SECONDS
    )
    page.ask(SHOW)
    return job_id


def _set(page: Page, **values: Any) -> None:
    page.ask(
        f"""values => {{
          for (const [name, value] of Object.entries(values))
            {TRAIN}.widgets.find(w => w.name === name).value = value;
        }}""",
        values,
    )


def _widen(page: Page) -> None:
    """Make the node wider, in Nodes 2.0 by its corner."""
    if not page.nodes2:
        page.ask(
            f"() => {{ {TRAIN}.setSize([700, {TRAIN}.size[1]]); app.canvas.setDirty(true, true); }}"
        )
        return
    node = page.ask(f"() => {TRAIN}.id")
    page.page.wait_for_timeout(800)  # until it has measured itself
    page.ask(SHOW)
    page.page.wait_for_timeout(500)
    corner = page.page.locator(f'[data-node-id="{node}"] .cursor-se-resize').bounding_box()
    assert corner
    x, y = corner["x"] + corner["width"] / 2, corner["y"] + corner["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 250, y, steps=5)
    page.page.mouse.up()


def _close_toasts(page: Page) -> None:
    """They lie over the Run button."""
    buttons = ".p-toast-close-button, [data-testid=toast-close]"
    page.ask(f"() => document.querySelectorAll('{buttons}').forEach(b => b.click())")
    page.page.locator(TOAST).first.wait_for(state="detached")


def _press(page: Page, what: str) -> None:
    page.ask(SHOW)
    page.page.wait_for_timeout(300)
    page.page.get_by_test_id(f"lora2-{what}").click()


def _stop_and_keep(page: Page, server: Any, job_id: str, picture: Any) -> None:
    """The file is there for the loaders without a restart."""
    _press(page, "stop")
    page.page.locator(f'{PANEL}[data-job-state="stopped"]').wait_for(timeout=SECONDS)
    _until(lambda: _job(server, job_id)["file"])
    required = server.get("/object_info/LoRA2Load")["LoRA2Load"]["input"]["required"]
    kind, *more = required["lora_name"]
    offered = kind if isinstance(kind, list) else more[0]["options"]
    assert _job(server, job_id)["file"] in offered
    page.page.wait_for_timeout(1200)
    picture("stopped")


def _reload(page: Page) -> None:
    page.page.wait_for_timeout(1500)  # the workflow is kept by ComfyUI, but not at once
    page.page.reload()
    page.page.wait_for_function(READY, timeout=60_000)
    page.page.wait_for_function(f"() => app.graph.nodes.length && {TRAIN}", timeout=60_000)


def _painting() -> Workflow:
    """A picture by the demo model, without any training."""
    nodes = quick(changed(twin("train_and_sample"), "7", model=["1", 0]))
    for prompt in ("4", "5"):
        nodes = changed(nodes, prompt, clip=["1", 1])
    return {key: node for key, node in nodes.items() if key in ("1", "4", "5", "6", "7", "8", "9")}


def _jobs(server: Any) -> list[dict[str, Any]]:
    return server.get("/lora2/jobs")["jobs"]


def _job(server: Any, job_id: str) -> dict[str, Any]:
    return next(job for job in _jobs(server) if job["id"] == job_id)


def _until(true: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "this did not come about"
        time.sleep(0.2)


def _write_lora(path: Path) -> None:
    components = [
        Component(
            f"input_blocks.4.1.transformer_blocks.{block}.{kind}.{layer}",
            torch.ones(rank, 64),
            torch.ones(64, rank),
            torch.ones(rank),
            1.0,
        )
        for block in (0, 1)
        for kind in ("attn1", "attn2")
        for rank, layer in enumerate(("to_q", "to_k", "to_v", "to_out.0"), 1)
    ]
    lora_file.save(
        path,
        components,
        {"modelspec.thumbnail": thumbnail(32), "modelspec.trigger_phrase": "sks robot"},
    )
