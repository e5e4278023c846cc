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
                )  # fmt: skip


def said(**levels: float) -> dict[str, verdict.Claim]:
    known = {name: METHODS[name] for name in METHODS}
    return {claim.sentence: claim for claim in verdict.claims(list(run(**levels)), known)}


def one(claims: dict[str, verdict.Claim], part: str) -> verdict.Claim:
    (found,) = [claim for sentence, claim in claims.items() if part in sentence]
    return found


def test_where_we_win_it_says_so():
    claims = said(ours=0.7)
    for part in ("same bytes its likeness is", "No fixed rank", "At 1/7.0 of the bytes", "AdaLoRA",
                 "then SVD", "4.44 times the bytes"):  # fmt: skip
        found = [claim for sentence, claim in claims.items() if part in sentence]
        assert found and all(claim.verdict == "holds" for claim in found), part
    assert one(claims, "Learnt ranks of two subjects").verdict == "holds"


def test_at_equal_bytes_means_equal_bytes():
    claims = said(ours=0.7)
    told = one(claims, "Cut to the bytes of AdaLoRA (PEFT) (7.00 MB")
    assert told.verdict == "holds" and "its likeness is 0.09" in told.sentence
    assert "1.50 times the memory to train" in one(claims, "Beside LoRA, rank 64, then").sentence


def test_methods_that_lack_subjects_are_kept_out_of_means():
    few = [each for each in run(ours=0.7) if each.method != "fixed-8" or each.subject == "mug-7"]
    assert "fixed-8" not in results.complete(few, METHODS, "balanced")
    claims = {claim.sentence: claim for claim in verdict.claims(few, METHODS)}
    assert one(claims, "No fixed rank").verdict == "holds", "mug-7 alone is easy"
    few = [each for each in run(ours=0.7) if each.method != "svd-64" or each.subject == "mug-7"]
    claims = {claim.sentence: claim for claim in verdict.claims(few, METHODS)}
    assert "; on 1 subjects only." in one(claims, "Beside LoRA, rank 64, then").sentence


def test_where_we_lose_it_says_so():
    claims = said(ours=0.55, prompt=0.5)
    for part in ("fixed ranks of the same bytes its likeness", "of the same bytes its prompt",
                 "Beside AdaLoRA", "then SVD", "fixed-8 is as small", "At 1/7.0"):  # fmt: skip
        assert one(claims, part).verdict == "fails", part
    assert "lower" in one(claims, "Beside AdaLoRA").sentence


@pytest.mark.parametrize(
    ("likeness", "prompt", "told"),
    [("holds", "holds", "holds"), ("holds", "fails", "open"), ("fails", "holds", "open"),
     ("open", "holds", "open"), ("open", "fails", "fails")],
)  # fmt: skip
def test_what_is_won_by_giving_the_other_up_is_not_won(
    likeness: verdict.Verdict, prompt: verdict.Verdict, told: str
):
    assert verdict.both(likeness, prompt) == told


def test_likelier_and_less_obedient_than_a_rival_is_open():
    claims = said(ours=0.7, prompt=0.5)
    assert one(claims, "Beside AdaLoRA").verdict == "open"


def test_drawn_subjects_and_photographs_are_told_apart():
    photographs = set(SUBJECTS[:2])
    found = [
        replace(each, thing=0.9, place=0.9)
        if each.subject not in photographs
        else replace(each, place=0.5 if each.method.startswith("balanced") else 0.9)
        for each in run(ours=0.7)
    ]
    claims = {claim.sentence: claim for claim in verdict.claims(found, METHODS)}
    for rival in ("beside LoRA, rank 64,", "beside AdaLoRA (PEFT), cut to its bytes,"):
        assert one(claims, f"On the 6 drawn subjects alone, {rival}").verdict == "holds"
        told = one(claims, f"On the 2 photographs alone, {rival}")
        assert told.verdict != "holds" and "its prompt score 0.400 lower" in told.sentence
    assert not [sentence for sentence in said(ours=0.7) if "alone" in sentence], "of one kind"
    cut = [one for one in found if one.method != "balanced-cut" or one.subject not in photographs]
    unfinished = {claim.sentence: claim for claim in verdict.claims(cut, METHODS)}
    assert [sentence for sentence in unfinished if "alone, beside LoRA" in sentence]
    assert not [sentence for sentence in unfinished if "alone, beside AdaLoRA" in sentence]


def test_what_the_sentences_rest_on_is_told():
    found = [each for each in run(ours=0.7) if each.method != "adalora" or each.seed == 0]
    assert page.markdown(found, METHODS).startswith("| | 8 subjects, seeds of each: 2 |")
    claims = {claim.sentence: claim for claim in verdict.claims(found, METHODS)}
    assert one(claims, "Beside AdaLoRA").sentence.endswith("; seeds of it: 1.")
    assert "seeds of it" not in one(claims, "then SVD").sentence


def test_without_what_a_verdict_is_about_there_is_none():
    others = [each for each in run(ours=0.7) if each.method != "balanced"]
    assert page.markdown(others, METHODS).startswith("No verdict: that takes records of balanced")


def test_a_term_that_changes_nothing_is_no_proof():
    entropy = one(said(ours=0.7), "With the entropy term")
    assert entropy.verdict == "open" and "0.0000 higher" in entropy.sentence


@pytest.mark.parametrize(
    ("gap", "beats", "no_worse"),
    [
        (Interval(0.1, 0.05, 0.2), "holds", "holds"),
        (Interval(0.01, -0.05, 0.1), "open", "holds"),
        (Interval(-0.001, -0.005, 0.002), "open", "holds"),
        (Interval(-0.01, -0.05, 0.1), "open", "open"),
        (Interval(-0.1, -0.2, -0.05), "fails", "fails"),
    ],
)
def test_the_rule(gap: Interval, beats: str, no_worse: str):
    assert (verdict.beats(gap), verdict.no_worse(gap)) == (beats, no_worse)


def test_the_page_needs_no_network_and_shows_every_method(tmp_path: Path):
    found = list(run(ours=0.7))
    told = page.write(found, METHODS, "Base: <demo>", tmp_path).read_text("utf-8")
    assert "&lt;demo&gt;" in told and not re.search(r"https?://|//", told)
    pictures = set(re.findall(r"src=(\S+?\.png)", told))
    assert pictures == {"front.png", "pairs.png", "sizes.png", "ranks.png"}
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
