"""The tab "LoRA²": trainings as a person follows, steers and uses them, in both renderers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.tests.browser.test_templates import DIALOG, READY, TOAST, Page
from lora2_pack.tests.server.asking import ask, check_error, get, in_background, of_name, until
from lora2_pack.tests.server.graphs import Workflow, changed, quick, twin
from lora2_tools.server import Server

TAB_BUTTON = ".lora2-tab-button, [data-testid=lora2-tab-button]"
ROW = "[data-testid=lora2-job]"
JOBS = "**/api/lora2/jobs"
SECONDS = 60_000
# A graph of one model; the id of its node.
MODEL_ONLY = """() => {
  app.graph.clear();
  const node = LiteGraph.createNode("LoRA2DemoModel");
  node.pos = [400, 300];
  app.graph.add(node);
  return node.id;
}"""
LOADERS = """() => app.graph.nodes.filter(node => node.type === "LoRA2Load").map(node => ({
  file: node.widgets.find(widget => widget.name === "lora_name").value,
  strength: node.widgets.find(widget => widget.name === "strength_model").value,
  model: node.getInputNode(0)?.id ?? null,
  selected: Boolean(app.canvas.selected_nodes[node.id]),
}))"""
CHANGE = """() => {
  const node = app.graph.nodes.find(node => node.type === "LoRA2Load");
  node.widgets.find(widget => widget.name === "lora_name").value = "none";
  node.widgets.find(widget => widget.name === "strength_model").value = 0.25;
}"""
UNNAMED = """() => [...document.querySelectorAll(".lora2-side button")]
  .filter(button => button.checkVisibility())
  .filter(button => !(button.ariaLabel || button.textContent).trim() || button.tabIndex < 0)
  .map(button => button.outerHTML)"""


@pytest.fixture(scope="module")  # in one renderer: the tab is no part of the graph that they draw
def opened(browser: Any, server: Any) -> Iterator[Page]:
    page = Page(browser, server, nodes2=False)
    yield page
    page.page.context.close()


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page, which no test may bring to an error."""
    opened.errors.clear()
    yield opened
    assert opened.errors == []


def _open_tab(page: Page) -> None:
    if page.page.locator("[data-testid=lora2-jobs]").count() == 0:
        page.page.locator(TAB_BUTTON).click()
    page.page.locator(".lora2-side h2", has_text="LoRA²").wait_for()


def _row(page: Page, job_id: str, state: str = "") -> Any:
    wanted = f"[data-job-state={state}]" if state else ""
    return page.page.locator(f'{ROW}[data-job-id="{job_id}"]{wanted}')


def _named(page: Page, name: str) -> str:
    """The id of the newest training of this name, once the tab shows it."""
    row = page.page.locator(ROW, has_text=name).first
    row.wait_for(timeout=SECONDS)
    return row.get_attribute("data-job-id")


def _press(page: Page, row: Any, name: str) -> None:
    """As with the keyboard."""
    row.get_by_role("button", name=name).focus()
    page.page.keyboard.press("Enter")


def _training(name: str, **inputs: Any) -> Workflow:
    short = quick({key: node for key, node in twin("train_and_sample").items() if key in "123"})
    settings = {"file_name": f"tests/{name}", "run": "background", "yield_to_prompts": False}
    return changed(short, "3", **settings, **inputs)


def _kept(server: Any) -> set[Path]:
    return set((server.directory / "user" / "lora2" / "checkpoints").glob("*.safetensors"))


def _clear_checkpoints(page: Page, server: Any, before: set[Path]) -> None:
    """What stopped trainings have left is told, and deleted with one click."""
    own = _kept(server) - before
    assert own
    told = page.page.locator("[data-testid=lora2-checkpoints]")
    told.wait_for()
    assert "checkpoint" in told.inner_text() and "MB" in told.inner_text()
    told.get_by_role("button", name="Delete").click()
    told.wait_for(state="hidden")
    assert not own & _kept(server)


# --- a real training ---------------------------------------------------------------------------


def test_a_training_is_steered_with_the_keyboard_and_its_file_used(page: Page, server: Any):
    name, before = f"steered_{int(page.nodes2)}", _kept(server)
    _open_tab(page)
    server.submit(_training(name, steps=5000))
    job_id = _named(page, name)
    _row(page, job_id, "running").wait_for(timeout=SECONDS)
    _until_it_steps(page, job_id)
    assert page.page.locator(TAB_BUTTON).inner_text().strip().startswith("1")
    assert page.ask(UNNAMED) == []

    _press(page, _row(page, job_id), "Pause")
    paused = _row(page, job_id, "paused")
    paused.wait_for(timeout=SECONDS)
    assert paused.get_by_role("button", name="Resume").evaluate("e => e === document.activeElement")
    step = _at_rest(page, job_id)
    page.page.keyboard.press("Enter")  # the button is now the one that resumes
    _row(page, job_id, "running").wait_for(timeout=SECONDS)
    page.page.wait_for_function(f"old => {_STEP} > old[1]", arg=[job_id, step], timeout=SECONDS)

    _press(page, _row(page, job_id), "Stop and keep")
    stopped = _row(page, job_id, "stopped")
    stopped.wait_for(timeout=SECONDS)
    page.page.locator(TOAST, has_text=name).first.wait_for()
    _load_and_check(page, stopped, name)
    _clear_checkpoints(page, server, before)


_STEP = """Number(document.querySelector(
  `[data-testid=lora2-job][data-job-id="${old[0]}"] [role=progressbar]`).ariaValueNow)"""


def _step(page: Page, job_id: str) -> int:
    return page.ask(f"old => {_STEP}", [job_id])


def _at_rest(page: Page, job_id: str) -> int:
    """The step at which a paused training stands, once the one that ran is over."""
    for _ in range(10):
        step = _step(page, job_id)
        page.page.wait_for_timeout(3000)
        if _step(page, job_id) == step:
            return step
    raise AssertionError("the training goes on")


def _until_it_steps(page: Page, job_id: str) -> None:
    page.page.wait_for_function(f"old => {_STEP} > 1", arg=[job_id], timeout=SECONDS)


def _load_and_check(page: Page, row: Any, name: str) -> None:
    """The row's file comes into the graph behind its model, and undo takes it away, for good."""
    model = page.ask(MODEL_ONLY)
    # The second gets the number of the first, whose values newer front ends remember by it.
    for _ in range(2):
        row.get_by_test_id("lora2-load").click()
        page.page.wait_for_function(f"() => ({LOADERS})().length === 1", timeout=20_000)
        [loader] = page.ask(LOADERS)
        assert name in loader.pop("file")
        assert loader == {"model": model, "selected": True, "strength": 1}
        [node] = [one for one in page.prompt().values() if one["class_type"] == "LoRA2Load"]
        assert node["inputs"]["model"] == [str(model), 0] and name in node["inputs"]["lora_name"]
        page.ask(CHANGE)
        page.ask("() => app.extensionManager.command.execute('Comfy.Undo')")
        page.page.wait_for_function(f"() => ({LOADERS})().length === 0", timeout=20_000)


def test_a_finished_training_shows_its_card(page: Page, server: Any):
    name = f"finished_{int(page.nodes2)}"
    _open_tab(page)
    server.submit(_training(name))
    row = _row(page, _named(page, name), "finished")
    row.wait_for(timeout=SECONDS)
    page.page.locator(TOAST, has_text=name).first.wait_for()
    row.scroll_into_view_if_needed()  # pictures are drawn of the rows that are seen
    picture = row.get_by_role("button", name="picture")
    picture.wait_for(timeout=SECONDS)
    assert row.locator("img").evaluate("image => image.naturalWidth") > 0
    assert "Mean rank" in row.inner_text() and "B" in row.inner_text()
    picture.click()
    large = page.page.locator("dialog.lora2-zoom")
    large.wait_for()
    page.page.keyboard.press("Escape")
    large.wait_for(state="detached")
    _load_and_check(page, row, name)


def test_a_waiting_training_can_be_taken_out_of_the_queue(page: Page, server: Any):
    first, second = (f"{what}_{int(page.nodes2)}" for what in ("ahead", "behind"))
    _open_tab(page)
    server.submit(_training(first, steps=5000))
    ahead = _named(page, first)
    _row(page, ahead, "running").wait_for(timeout=SECONDS)
    server.submit(_training(second, seed=7))
    behind = _named(page, second)
    _row(page, behind, "queued").wait_for(timeout=SECONDS)
    assert "Queued · 1" in _row(page, behind).inner_text()
    _press(page, _row(page, behind), "Remove")
    _row(page, behind, "stopped").wait_for(timeout=SECONDS)
    _press(page, _row(page, ahead), "Stop and keep")
    _row(page, ahead, "stopped").wait_for(timeout=SECONDS)


def test_after_a_reload_the_list_is_there(page: Page, server: Any):
    known = server.get("/lora2/jobs")["jobs"]
    page.page.reload()
    page.page.wait_for_function(READY, timeout=SECONDS)
    _open_tab(page)
    page.page.wait_for_function(
        f"count => document.querySelectorAll('{ROW}').length === count", arg=len(known)
    )


def test_a_training_that_an_accident_interrupted_goes_on(
    browser: Any, runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Server(runtime, tmp_path) as server:
        demo = {"class_type": "LoRA2DemoModel", "inputs": {}}
        server.submit(in_background("api/cut", 24, demo))
        until(lambda: (of_name(server, "cut", "running") or {"step": 0})["step"] >= 7)
        assert server._process is not None
        server._process.kill()
        server._process.wait()
        server.start()
        cut = of_name(server, "cut", "interrupted")
        _check_what_is_interrupted(server, cut)
        page = Page(browser, server, nodes2=False)
        _open_tab(page)
        row = page.page.locator(f"{ROW}[data-job-state=interrupted]")
        row.wait_for()
        row.get_by_role("button", name="Resume").click()
        row.wait_for(state="detached", timeout=SECONDS)
        page.page.locator(f"{ROW}[data-job-state=finished]").wait_for(timeout=SECONDS)
        assert page.errors == []
        page.page.context.close()
        _check_it_has_gone_on(server, cut["id"])


def _check_what_is_interrupted(server: Any, cut: Any) -> None:
    assert cut and cut["resumable"] and cut["node_id"] == "3"
    get(server, f"/lora2/jobs/{cut['id']}", "job")
    for what in ("pause", "cancel"):
        check_error(ask(server, f"/lora2/jobs/{cut['id']}/{what}", "POST"), 409)
    json_sent = {"Content_Type": "application/json"}
    check_error(ask(server, f"/lora2/jobs/{cut['id']}/resume", "POST", b"[", **json_sent), 400)


def _check_it_has_gone_on(server: Any, old: str) -> None:
    assert ask(server, f"/lora2/jobs/{old}/resume", "POST")[0] in (404, 409)  # it has by now
    done = of_name(server, "cut", "finished")
    assert done["id"] != old
    assert "Going on after step" in done["message"] and str(server.directory) not in done["message"]
    job = get(server, f"/lora2/jobs/{done['id']}", "job")
    assert job["history"]["steps"] == list(range(1, 25))
    jobs = get(server, "/lora2/jobs", "jobs")["jobs"]
    assert [found["id"] for found in jobs] == [done["id"]]


# --- lists that this server cannot have ----------------------------------------------------------


def _job(number: int, **changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("seconds_left", "loss", "smoothed", "mean_rank", "target_rank", "bytes", "target_bytes")
    )
    return {
        **empty,
        **{"id": f"job-{number}", "name": f"training {number}", "node_id": "3"},
        **{"state": "finished", "background": True, "created": 1.7e9 + number},
        **{"step": 400, "steps": 400, "message": "", "error": None, "position": None},
        **{"waits": False, "resumable": False, "file": None, "samples": 0},
        **changes,
    }


@pytest.fixture
def listed(page: Page) -> Iterator[Any]:
    """Show a list of the test's making."""

    def show(jobs: list[dict[str, Any]]) -> None:
        page.page.route(JOBS, lambda route: route.fulfill(json={"jobs": jobs}))
        page.page.reload()
        page.page.wait_for_function(READY, timeout=SECONDS)
        _open_tab(page)

    yield show
    page.page.unroute(JOBS)


def test_an_empty_list_says_what_to_do(page: Page, listed: Any):
    listed([])
    page.page.get_by_text("No trainings yet").wait_for()
    page.page.get_by_role("button", name="Browse templates").click()
    page.page.locator(DIALOG).first.wait_for()
    page.page.keyboard.press("Escape")


def test_what_the_server_says_against_a_wish_is_shown(page: Page, listed: Any):
    listed([_job(1, state="running", step=4)])
    page.page.get_by_role("button", name="Pause").click()
    alert = page.page.locator(f"{ROW} [role=alert]")
    page.page.wait_for_function(f"() => document.querySelector('{ROW} [role=alert]').textContent")
    assert len(alert.inner_text()) > 10


def test_a_hundred_rows_are_changed_in_place(page: Page, listed: Any):
    jobs = [_job(number) for number in range(100)] + [_job(100, state="running", step=1)]
    listed(jobs)
    page.page.wait_for_function(f"() => document.querySelectorAll('{ROW}').length === 101")
    spent = page.ask(
        """async jobs => {
          const rows = [...document.querySelectorAll("[data-testid=lora2-job]")];
          let added = 0;
          const watch = new MutationObserver(all => {
            for (const { addedNodes } of all)
              for (const node of addedNodes) if (node.nodeType === 1) added += 1;
          });
          const list = document.querySelector("[data-testid=lora2-jobs]");
          watch.observe(list, { childList: true, subtree: true });
          const start = performance.now();
          for (let step = 2; step < 202; step += 1) {
            const job = { ...jobs[100], step, loss: 1 / step };
            app.api.dispatchCustomEvent("lora2.progress", { job, points: [], sample: null });
          }
          list.getBoundingClientRect();
          const spent = (performance.now() - start) / 200;
          await new Promise(requestAnimationFrame);
          const now = [...document.querySelectorAll("[data-testid=lora2-job]")];
          return [spent, added, now.every((row, place) => row === rows[place])];
        }""",
        jobs,
    )
    assert spent[1:] == [0, True], "an event makes no elements"
    assert spent[0] < 5, f"{spent[0]:.1f} ms for one event"
    assert _step(page, "job-100") == 201


def test_an_ended_training_moves_to_the_others(page: Page, listed: Any):
    listed([_job(1, state="running", step=4), _job(2)])
    page.page.locator(ROW).nth(1).wait_for()
    ended = json.dumps(_job(1, background=False))
    page.ask(f'() => app.api.dispatchCustomEvent("lora2.progress", {{ job: {ended} }})')
    order = f"() => [...document.querySelectorAll('{ROW}')].map(row => row.dataset.jobId)"
    assert page.ask(order) == ["job-2", "job-1"]
