"""What the benchmark says of numbers whose meaning is known, also when we lose."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from lora2_pack.bench.paper import methods
from lora2_pack.bench.paper.records import archive, results
from lora2_pack.bench.paper.records.results import Interval, Result, likeness
from lora2_pack.bench.paper.report import page, verdict
from lora2_pack.bench.paper.runs import sweep, tuning

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "bench" / "paper" / "results" / "demo.jsonl"
METHODS = methods.methods_for(64)
SUBJECTS = [f"mug-{number}" for number in range(8)]
KEYS = [
    f"lora_unet_{block}_transformer_blocks_0_attn{kind}_to_{side}"
    for block in ("input_blocks_4_1", "middle_block_1", "output_blocks_3_1")
    for kind in (1, 2)
    for side in ("q", "k", "v", "out_0")
]


def run(ours: float, largest: float = 0.7, adalora: float = 0.6, prompt: float = 0.9):
    """Results in which every method has a level of its own, and subjects differ by as much."""
    levels = {"fixed-1": 0.5, "fixed-8": 0.65, "fixed-64": largest, "balanced": ours,
              "balanced-in-ranks": ours, "balanced-no-rank": ours,
              "balanced-no-entropy": ours, "adalora": adalora, "svd-64": 0.66}  # fmt: skip
    levels["balanced-cut"] = ours - 0.01
    sizes = {"fixed-1": 1, "fixed-8": 8, "fixed-64": 63, "balanced-no-rank": 40,
             "balanced-cut": 7, "adalora": 7}  # fmt: skip
    rng = random.Random(0)
    for method, level in levels.items():
        for number, subject in enumerate(SUBJECTS):
            for seed in range(2):
                ranks = {key: 1 + (number * 7 + place) % 16 for place, key in enumerate(KEYS)}
                yield Result(
                    subject, method, seed, level + 0.05 * number + rng.gauss(0, 0.002),
                    prompt if method.startswith("balanced") else 0.9, None, None,
                    1_000_000 * sizes.get(method, 9), 30.0, 150.0 if method == "svd-64" else 100.0,
                    ranks,
                    {"likeness, a": level},
                    ranks,
                )  # fmt: skip


def rows_of(found: list[Result]) -> dict[str, verdict.Row]:
    return {row.about: row for row in verdict.rows(found, METHODS)}


def said(**levels: float) -> dict[str, verdict.Row]:
    return rows_of(list(run(**levels)))


def one(rows: dict[str, verdict.Row], part: str, kind: int = 0) -> verdict.Cell:
    (found,) = [row for about, row in rows.items() if part in about]
    cell = found.cells[kind]
    assert cell is not None
    return cell


CUT = "AdaLoRA (PEFT) (7.00 MB, 1.00 × the memory to train, ours cut to its bytes)"


def test_where_we_win_it_says_so():
    rows = said(ours=0.72)
    for part in ("the same bytes", "LoRA, rank 64 (", CUT, "then SVD", "Without the rank term"):
        assert one(rows, part).verdict == "holds", part
    assert one(rows, "Without the rank term").text.startswith("+31.00 MB (+31.00 to +31.00)")
    assert one(rows, "budget in ranks").verdict == "open", "there they are the same"
    assert one(rows, "Learnt ranks of two subjects").verdict == "holds"


def test_at_equal_bytes_means_equal_bytes():
    rows = said(ours=0.7)
    told = one(rows, CUT)
    assert told.verdict == "holds" and told.text.startswith("likeness +0.09")
    assert any("LoRA, rank 64, then SVD (9.00 MB, 1.50 × the memory" in about for about in rows)


def test_methods_that_lack_subjects_say_so():
    few = [each for each in run(ours=0.7) if each.method != "svd-64" or each.subject == "mug-7"]
    told = one(rows_of(few), "LoRA, rank 64, then")
    assert told.text.endswith("; 1 subjects") and told.verdict == "open", "one subject is no proof"


def test_where_we_lose_it_says_so():
    rows = said(ours=0.55, prompt=0.5)
    for part in ("the same bytes", "LoRA, rank 64 (", "AdaLoRA (PEFT) (7.00 MB, 1.00 × the memory "
                 "to train)", "then SVD"):  # fmt: skip
        assert one(rows, part).verdict == "fails", part
    assert one(rows, CUT).text.startswith("likeness -0.06")


WAYS = {"better": Interval(0.1, 0.05, 0.2), "worse": Interval(-0.1, -0.2, -0.05),
        "level": Interval(0.01, -0.1, 0.1)}  # fmt: skip


@pytest.mark.parametrize(
    ("likeness", "prompt", "told"),
    [("better", "better", "holds"), ("better", "level", "holds"), ("level", "better", "holds"),
     ("better", "worse", "open"), ("worse", "better", "open"), ("level", "level", "open"),
     ("level", "worse", "fails"), ("worse", "level", "fails"), ("worse", "worse", "fails"),
     ("better", None, "holds"), ("worse", None, "fails"), ("level", None, "open")],
)  # fmt: skip
def test_a_tie_in_one_score_does_not_excuse_a_loss_in_the_other(
    likeness: str, prompt: str | None, told: str
):
    assert verdict.judged(WAYS[likeness], WAYS[prompt] if prompt else None) == told


def test_likelier_and_less_obedient_than_a_rival_is_a_trade():
    cell = one(said(ours=0.7, prompt=0.5), CUT)
    assert cell.verdict == "open" and cell.text.endswith("; a trade")


def test_drawn_subjects_and_photographs_are_told_apart():
    photographs = set(SUBJECTS[:3])
    found = [
        replace(each, thing=0.9, place=0.9)
        if each.subject not in photographs
        else replace(each, place=0.5 if each.method.startswith("balanced") else 0.9)
        for each in run(ours=0.7)
    ]
    assert verdict.heads(found) == ["5 drawn subjects, 2 seeds each", "3 photographs, 2 seeds each"]
    rows = rows_of(found)
    assert one(rows, CUT, 0).verdict == "holds"
    assert one(rows, CUT, 1).verdict == "open" and "prompt -0.400" in one(rows, CUT, 1).text
    assert verdict.heads(list(run(ours=0.7))) == ["8 subjects, 2 seeds each"]
    cut = [one for one in found if one.method != "balanced-cut" or one.subject not in photographs]
    assert rows_of(cut)[next(iter(about for about in rows if CUT in about))].cells[1] is None


def test_what_a_row_rests_on_is_told():
    found = [each for each in run(ours=0.7) if each.method != "adalora" or each.seed == 0]
    assert page.markdown(found, METHODS).startswith(
        "| balanced beside … | 8 subjects, 2 seeds each |"
    )
    assert one(rows_of(found), CUT).text.endswith("; 1 seed")
    assert "seed" not in one(rows_of(found), "LoRA, rank 64, then").text


def test_one_seed_is_compared_with_the_same_seed():
    """Not with the mean of all: here the second seed of ours is far off."""
    found = [
        replace(each, likeness=each.likeness + (each.method == "balanced-cut") * each.seed)
        for each in run(ours=0.7)
        if each.method != "adalora" or each.seed == 0
    ]
    assert one(rows_of(found), CUT).text.startswith("likeness +0.09")


def test_a_bench_that_cannot_tell_ranks_apart_says_so():
    two = [replace(each, method="fixed-2") for each in run(ours=0.7) if each.method == "fixed-1"]
    rows = rows_of([*run(ours=0.7), *two])
    assert one(rows, "Ranks can be told apart").verdict == "holds"
    alike = [replace(each, method="fixed-2") for each in run(0.7) if each.method == "fixed-64"]
    rows = rows_of([*run(ours=0.7), *alike])
    assert one(rows, "Ranks can be told apart").verdict == "fails"


def test_without_what_a_verdict_is_about_there_is_none():
    others = [each for each in run(ours=0.7) if each.method != "balanced"]
    assert page.markdown(others, METHODS).startswith("No verdict: that takes records of balanced")


def test_a_term_that_changes_nothing_is_no_proof():
    entropy = one(said(ours=0.7), "With the entropy term")
    assert entropy.verdict == "open" and entropy.text.startswith("prompt +0.0000")


def test_calibrated_strength_has_a_verdict_of_its_own_and_comes_first(tmp_path: Path):
    full = [each for each in run(ours=0.7) if each.method in ("balanced", "fixed-64")]
    ours = {"balanced": 0.1}  # weaker files differ by that in likeness
    weaker = [
        replace(
            each,
            method=each.method + methods.KEPT,
            likeness=each.likeness + ours.get(each.method, 0),
        )
        for each in full
    ]
    seen = page.views([*full, *weaker])
    assert list(seen) == ["At calibrated strength", "At full strength"]
    texts = [one(rows_of(some), "LoRA, rank 64 (").text for some in seen.values()]
    gaps = [float(text.removeprefix("likeness ").split()[0]) for text in texts]
    assert gaps[0] == pytest.approx(gaps[1] + 0.1, abs=2e-3)
    told = page.write([*full, *weaker], METHODS, "", tmp_path).read_text("utf-8")
    assert told.index("At calibrated") < told.index("At full")
    assert (tmp_path / "strength.png").read_bytes()[:4] == b"\x89PNG" and "strength.png" in told
    assert list(page.views(full)) == ["At full strength"]


def test_the_page_needs_no_network_and_shows_every_method(tmp_path: Path):
    found = list(run(ours=0.7))
    told = page.write(found, METHODS, "Base: <demo>", tmp_path).read_text("utf-8")
    assert "&lt;demo&gt;" in told and not re.search(r"https?://|//", told)
    pictures = set(re.findall(r"src=(\S+?\.png)", told))
    expected = {"front-0-0", "pairs-0-0", "subjects", "sizes", "ranks"}
    assert pictures == {f"{name}.png" for name in expected}
    for name in pictures:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    for name in {one.method for one in found}:
        assert METHODS[name].label in told
    best = max(
        statistics_mean for statistics_mean in
        (sum(results.by_subject(found, name, likeness).values()) / 8
         for name in {one.method for one in found})
    )  # fmt: skip
    assert f"<td class=best>{best:.3f}</td>" in told
    assert page.markdown(found, METHODS).count("\n| ") > 5
    assert "<td class=open>" in told and "<td class=holds>" in told


def test_without_results_there_is_no_page(tmp_path: Path):
    with pytest.raises(ValueError, match="run the benchmark first"):
        page.write([], METHODS, "", tmp_path)


def test_few_methods_are_enough_for_a_page(tmp_path: Path):
    for chosen in ({"fixed-1"}, {"fixed-1", "balanced"}, {"balanced"}):
        found = [one for one in run(ours=0.7) if one.method in chosen]
        assert page.write(found, METHODS, "", tmp_path).is_file()


def test_the_table_of_a_sweep_is_in_order_and_says_by_how_much():
    known = sweep.variants(METHODS[methods.IN_RANKS])
    levels = {"as-it-is": 0.7, "quantile-0.5": 0.72, "start-maximum": 0.6}
    found = [
        Result(subject, name, 0, level, 0.9, None, None, 500_000, 1.0, 1.0, {})
        for name, level in levels.items()
        for subject in SUBJECTS[:3]
    ]
    rows = sweep.table(found, known).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["0.720", "0.700", "0.600"]
    assert [row.split(" | ")[2] for row in rows] == ["+0.020", "", "-0.100"]
    assert known["quantile-0.5"].label in rows[0] and rows[0].endswith(" 0.50 |")


def test_all_kept_records_are_of_one_run():
    rates = json.loads(tuning.FILE.read_text("utf-8"))["demo"]
    records = archive.read(RECORDS)
    for key in ("base", "plan", "sampling"):
        assert len({json.dumps(record["settings"][key]) for record in records}) == 1
    for record in records:
        own = record["settings"]
        name = own["method"]
        if own["rate"] is not None:
            tuned = name if name in rates else methods.IN_RANKS
            assert own["rate"] == rates[tuned]["rate"], f"{name}: trained at another rate"
        if name in METHODS:
            method = METHODS[name]
            asked = (method.kind, method.mode, method.entropy, method.of, method.to, method.part)
            keys = ("kind", "mode", "entropy", "of", "to", "part")
            assert asked == tuple(own["how"][key] for key in keys), f"{name}: another method now"
            for key, made_from in (("of_how", method.of), ("to_how", method.to)):
                if key in own["how"]:
                    assert own["how"][key]["rate"] == rates[made_from]["rate"], name
            assert ("of_how" in own["how"]) == bool(method.of), name


def test_the_readme_says_what_the_records_say():
    told = page.markdown(results.read(RECORDS), METHODS)
    assert told in (ROOT / "README.md").read_text("utf-8"), (
        "run `python -m bench.paper --report --archive bench/paper/results/demo.jsonl --out DIR`, "
        "put DIR/report/front.png into docs/images and the table it prints into README.md"
    )


def test_the_page_on_the_method_has_the_table_of_strengths_as_measured():
    known = sweep.variants(METHODS[methods.IN_RANKS])
    told = sweep.table(results.read(RECORDS.with_name("strength.jsonl")), known)
    assert told in (ROOT / "docs" / "method.md").read_text("utf-8")
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in told.splitlines()}
    kept, whole = rows["gain kept 0.96"], rows["as it is"]
    assert kept[2] == "-0.002" and round(float(kept[3]) - float(whole[3]), 3) in (0.052, 0.053)
