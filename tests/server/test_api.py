"""The REST interface and its events on a booted server, as docs/api.md describes them."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from lora2_pack.tests.server import api_schema
from lora2_pack.tests.server.asking import (
    Ear,
    ask,
    check_error,
    get,
    in_background,
    of_name,
    post,
    until,
)
from lora2_pack.tests.server.studio import Studio
from PIL import Image


@pytest.fixture(scope="module")
def trained(studio: Studio) -> Iterator[dict[str, Any]]:
    """A training in the background: paused, gone on with, finished; and all its events."""
    server = studio.server
    with Ear(server) as ear:
        started = time.monotonic()
        studio.run(in_background("api/whole", 16))
        job = until(lambda: of_name(server, "whole", "running"))
        paused = post(server, job["id"], "pause")
        twice = ask(server, f"/lora2/jobs/{job['id']}/pause", "POST")
        held = get(server, f"/lora2/jobs/{job['id']}", "job")
        resumed = post(server, job["id"], "resume")
        until(lambda: of_name(server, "whole", "finished"))
        until(lambda: ear.states(job["id"])[-1:] == ["finished"], 10)
    yield {
        "id": job["id"], "first": job, "paused": paused, "twice": twice, "held": held,
        "resumed": resumed, "ear": ear, "seconds": ear.heard[-1][0] - started,
    }  # fmt: skip


def test_a_training_is_listed_paused_and_gone_on_with(trained: dict[str, Any]):
    first = trained["first"]
    assert (first["node_id"], first["steps"], first["background"]) == ("3", 16, True)
    assert first["target_rank"] == 2 and first["bytes"] > 0
    assert trained["paused"]["state"] == "paused" and trained["paused"]["resumable"]
    assert "paused" in check_error(trained["twice"], 409)
    assert trained["held"]["components"] and trained["held"]["step"] < 16
    assert trained["resumed"]["state"] == "running"


def test_what_is_finished_can_be_looked_at(studio: Studio, trained: dict[str, Any]):
    server, id = studio.server, trained["id"]
    job = get(server, f"/lora2/jobs/{id}", "job")
    assert job["state"] == "finished" and job["history"]["steps"] == list(range(1, 17))
    assert [sample["step"] for sample in job["samples"]] == [4, 8, 12, 16]
    assert job["file"].startswith("api/whole_") and job["log"]
    assert job["bytes"] == (studio.loras / job["file"]).stat().st_size
    for url in job["samples"][-1]["urls"]:
        for prefix in ("", "/api"):
            status, data = ask(server, prefix + url)
            assert status == 200 and Image.open(io.BytesIO(data)).format == "PNG"
    status, data = ask(server, f"/lora2/jobs/{id}/report")
    assert status == 200 and Image.open(io.BytesIO(data)).size[0] == 1280
    rows = list(dict.fromkeys(c["row"] for c in job["components"]))
    assert rows[0].startswith("down") and rows[-1].startswith("up")
    assert all(0 < c["rank"] <= c["max_rank"] for c in job["components"])
    for what in ("cancel", "pause", "resume"):
        check_error(ask(server, f"/lora2/jobs/{id}/{what}", "POST"), 409)


def test_the_file_can_be_inspected(studio: Studio, trained: dict[str, Any]):
    server = studio.server
    job = get(server, f"/lora2/jobs/{trained['id']}", "job")
    file = get(server, f"/lora2/inspect?name={quote(job['file'])}", "file")
    assert file["bytes"] == job["bytes"] and file["mean_rank"] == job["mean_rank"]
    assert [c["module"] for c in file["components"]] == [c["module"] for c in job["components"]]
    assert [c["rank"] for c in file["components"]] == [c["rank"] for c in job["components"]]
    assert file["kinds"] == {"lora": len(file["components"])} and file["thumbnail"] is None
    assert file["hashes"]["sshs_model_hash"] and file["base"].endswith("(context 192)")
    assert "16 steps" in file["headline"] and file["metadata"]["ss_steps"] == "16"
    assert str(studio.server.directory) not in json.dumps([file, job])


def test_events(trained: dict[str, Any]):
    ear, id = trained["ear"], trained["id"]
    mine = [(at, event) for at, _, event in ear.heard if event["job"]["id"] == id]
    for _, event in mine:
        assert api_schema.complaints(event, "lora2.progress") == []
    # The pause is short: what came and went between two slots need not be told.
    assert [s for s in ear.states(id) if s != "paused"][-1] == "finished"
    points = [point for _, event in mine for point in event["points"]]
    assert [step for step, _, _ in points] == list(range(1, 17))
    assert mine[0][1].get("ranks") and mine[-1][1]["job"]["file"]
    assert {4, 8, 12, 16} >= {e["sample"] for _, e in mine if e["sample"]} >= {16}
    assert len(ear.heard) <= 3 * trained["seconds"] + 3


def test_two_trainings_one_after_the_other_and_a_cancel_of_each(studio: Studio):
    server = studio.server
    studio.run(in_background("api/one", 5000))
    studio.run(in_background("api/two", 5000))
    one = until(lambda: of_name(server, "one", "running"))
    two = until(lambda: of_name(server, "two", "queued"))
    assert two["position"] == 1 and two["step"] == 0
    check_error(ask(server, f"/lora2/jobs/{two['id']}/pause", "POST"), 409)
    assert post(server, two["id"], "cancel")["state"] == "stopped"
    until(lambda: get(server, f"/lora2/jobs/{one['id']}", "job")["step"] > 1)
    post(server, one["id"], "cancel")
    stopped = until(lambda: of_name(server, "one", "stopped"))
    assert stopped["file"] and stopped["file"] in ask(server, "/models/loras")[1]
    assert of_name(server, "two", "stopped")["file"] is None
