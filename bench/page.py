"""How quickly the page draws a training: the heat map of SDXL and a curve of 5,000 points.

``.venv/bin/python bench/page.py --json`` prints one JSON object. Both drawings are painted in a
real Chromium without a graphics card, after every change that an event of a training makes, and
each time their pixels are waited for; the page draws them at most once a frame, which is counted
as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

WEB = Path(__file__).resolve().parent.parent / "web"
ADDRESS = "http://lora2.invalid"  # nothing leaves this process: every answer comes from here
CELLS, POINTS = 560, 5000
LIMIT = 16.0  # ms, one frame of most screens
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The two modules of ComfyUI's page that ours import.
HOST = {
    "/scripts/api.js": "export const api = new EventTarget(); api.fetchApi = async () => ({});",
    "/scripts/app.js": "export const app = {};",
}
PAGE = '<!doctype html><meta charset="utf-8"><body style="margin: 0"><div id="host"></div>'
MEASURE = """async ([cells, points, rounds]) => {
  const lib = "/extensions/lora2/lib";
  const { HeatMap } = await import(`${lib}/heatmap.mjs`);
  const { Curve } = await import(`${lib}/curve.mjs`);
  const host = document.getElementById("host");
  host.style.width = "420px";
  const map = new HeatMap(host, { label: "" }), curve = new Curve(host, { label: "" });
  const kinds = ["attn1", "attn2"].flatMap(a => ["q", "k", "v", "out"].map(l => `${a}.${l}`));
  map.set(Array.from({ length: cells }, (_, i) => ({
    module: `module ${i}`, label: "", row: `down ${i >> 6}.1 · ${i >> 3}`, column: kinds[i % 8],
    rank: 1 + i % 128, max_rank: 128, nu: 1, bytes: 1000,
  })));
  const noise = i => Math.abs(Math.sin(i * 12.9898) * 43758.5453) % 1;
  const steps = Array.from({ length: points - rounds }, (_, i) => i + 1);
  const loss = steps.map(i => 0.1 + 0.1 * noise(i));
  curve.set({ steps, loss, smoothed: loss, mean_rank: steps.map(i => 8 + i / 1000) });
  const frame = () => new Promise(requestAnimationFrame);
  await frame(); await frame();
  const times = [];
  for (let round = 1; round <= rounds; round += 1) {
    const at = points - rounds + round;
    map.update(Array.from({ length: cells }, (_, i) => 1 + (i + round) % 128));
    curve.add([[at, 0.1 + 0.1 * noise(at), 8 + at / 1000]]);
    const begin = performance.now();
    for (const { surface } of [map, curve]) {
      surface.paint();
      surface.canvas.getContext("2d").getImageData(0, 0, 1, 1); // until it is really painted
    }
    times.push(performance.now() - begin);
    await frame();
  }
  let paints = 0;
  for (const { surface } of [map, curve]) {
    const paint = surface.paint;
    surface.paint = function () { paints += 1; paint.call(this); };
  }
  for (let i = 0; i < 100; i += 1) { map.surface.request(); curve.surface.request(); }
  await frame(); await frame();
  const drawn = [Number(map.canvas.dataset.cells), Number(curve.canvas.dataset.points)];
  return { times, drawn, paints };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=200, help="timed frames, at least 20")
    parser.add_argument("--pixels", type=float, default=2.0, help="device pixels for one of CSS")
    options = parser.parse_args()
    if options.rounds < 20:
        parser.error("--rounds must be at least 20")
    found = report(options.rounds, options.pixels)
    print(json.dumps(found, indent=2) if options.json else _sentence(found))
    sys.exit(0 if found["holds"] else 1)


def report(rounds: int, pixels: float) -> dict[str, Any]:
    """Every figure, and whether the limit holds."""
    found = _measure(rounds, pixels)
    times = sorted(found["times"])
    p95 = times[min(len(times) - 1, round(0.95 * (len(times) - 1)))]
    return {
        "cells": found["drawn"][0],
        "points": found["drawn"][1],
        "pixels": pixels,
        "rounds": rounds,
        "median_ms": round(times[len(times) // 2], 2),
        "p95_ms": round(p95, 2),
        "worst_ms": round(times[-1], 2),
        "limit_ms": LIMIT,
        "paints_for_200_requests": found["paints"],
        "holds": p95 <= LIMIT and found["drawn"] == [CELLS, POINTS] and found["paints"] <= 2,
    }


def _measure(rounds: int, pixels: float) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        sys.exit("No Chromium is here; install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(device_scale_factor=pixels)
        page.route("**/*", _answer)
        page.goto(f"{ADDRESS}/")
        try:
            return page.evaluate(MEASURE, [CELLS, POINTS, rounds])
        finally:
            browser.close()


def _answer(route: Any) -> None:
    """What ComfyUI's server would send."""
    path = route.request.url.removeprefix(ADDRESS).split("?")[0]
    if path == "/":
        return route.fulfill(body=PAGE, content_type="text/html")
    body = HOST.get(path)
    if path.startswith("/extensions/lora2/"):
        body = (WEB / path.removeprefix("/extensions/lora2/")).read_text(encoding="utf-8")
    if body is None:
        return route.fulfill(status=404, body="")
    return route.fulfill(body=body, content_type="text/javascript")


def _sentence(found: dict[str, Any]) -> str:
    verdict = "within" if found["holds"] else "NOT within"
    return (
        f"{found['cells']} cells and {found['points']} points: median {found['median_ms']} ms, "
        f"95 percent in {found['p95_ms']} ms, {verdict} {found['limit_ms']} ms."
    )


if __name__ == "__main__":
    main()
