"""The arithmetic of the paper's benchmark, on numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.bench.paper import methods, plan
from lora2_pack.bench.paper.plan import Plan
from lora2_pack.bench.paper.records import archive, results
from lora2_pack.bench.paper.records.results import Point, Result
from lora2_pack.bench.paper.subjects import table_a1
from scipy import stats


def result(method: str, subject: str, seed: int = 0, likeness: float = 0.5, **more) -> Result:
    known = {
        "place": 1.0,
        "thing": None,
        "text": None,
        "nbytes": 100,
        "seconds": 1.0,
        "peak_megabytes": 1.0,
    }
    return Result(subject, method, seed, likeness, **{**known, "ranks": {}, **more})


def test_table_a1_is_whole():
    assert len(table_a1.PROMPTS) == 30 and table_a1.TUNING in table_a1.PROMPTS
    for subject, prompts in table_a1.PROMPTS.items():
        assert len(prompts) == 10
        word = table_a1.class_of(subject)
        assert all(f"<c> {word}" in prompt for prompt in prompts), subject
    assert table_a1.class_of("bear_plushie") == "stuffed animal"
    assert table_a1.prompts_of("vase", "sks")[0].count("sks vase") == 1


def test_ranks_are_the_papers_where_the_base_is_as_wide():
    assert methods.fixed_ranks(640) == methods.PAPERS_RANKS
    assert methods.fixed_ranks(64) == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("width", [64, 640, 1280])
def test_what_a_cut_needs_comes_before_it(width: int):
    known = methods.methods_for(width)
    order = list(known)
    for name, method in known.items():
        assert method.trained == (not method.of)
        for needed in filter(None, (method.of, method.to)):
            assert order.index(needed) < order.index(name)
    four = methods.quick(known)
    assert len(set(four)) == 4 and set(four) <= set(known) and known[four[3]].of == four[1]
    largest = known[f"fixed-{methods.fixed_ranks(width)[-1]}"].rank["target_rank"]
    ours = known[methods.OURS]
    assert (ours.to, ours.part) == (f"fixed-{largest:g}", 7)
    assert known[methods.IN_RANKS].rank["target_rank"] == pytest.approx(largest / 7, rel=0.1)


def test_a_plan_needs_something_to_do():
    with pytest.raises(ValueError, match="pictures is 0"):
        Plan(pictures=0)


def test_a_plan_is_changed_by_words():
    assert plan.changed(Plan(), "steps=20, prompts=2") == Plan(steps=20, prompts=2)
    assert plan.changed(Plan(), "") == Plan()
    for wrong in ("steps", "steps=a", "colour=2", "steps=0"):
        with pytest.raises(ValueError, match="write it as steps=300"):
            plan.changed(Plan(), wrong)


def test_records_are_read_as_the_paper_averages(tmp_path: Path):
    scores = {
        "a": {"likeness": [0.2, 0.4], "place": [1.0, 0.5]},
        "b": {"likeness": [0.6, 0.8], "place": [0.5, 0.0], "object": [1.0, 1.0]},
    }
    settings = {"subject": "mug-1", "method": "fixed-8", "seed": 2}
    file = tmp_path / "records" / "mug-1" / "fixed-8-0.004-2.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"settings": settings, "scores": scores, "bytes": 7}))
    (found,) = results.read(tmp_path)
    assert (found.subject, found.method, found.seed, found.nbytes) == ("mug-1", "fixed-8", 2, 7)
    assert found.likeness == pytest.approx(0.5)
    assert (found.place, found.thing) == (pytest.approx(0.5), pytest.approx(1.0))
    assert found.prompt == pytest.approx(0.75)


def test_seeds_are_averaged_within_a_subject():
    some = [
        result("m", "a", 0, 0.2), result("m", "a", 1, 0.4), result("m", "b", 0, 0.9),
        result("n", "a", 0, 0.5),
    ]  # fmt: skip
    assert results.by_subject(some, "m", lambda one: one.likeness) == {
        "a": pytest.approx(0.3), "b": pytest.approx(0.9),
    }  # fmt: skip
    gained = results.paired(some, "m", "n", lambda one: one.likeness)
    assert gained is not None and gained.mean == pytest.approx(0.3), "the shared subject and seed"
    assert results.paired(some, "m", "gone", lambda one: one.likeness) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_an_interval_is_student_s(values: list[float]):
    """As SciPy's own test has it, which knows nothing of leaving one out."""
    found = results.interval(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    if error < 1e-6:
        assert found.high - found.low < 1e-4
        return
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_an_interval_narrows_with_the_number_of_subjects():
    few, many = results.interval([0.0, 1.0] * 3), results.interval([0.0, 1.0] * 100)
    assert many.high - many.low < 0.4 * (few.high - few.low)
    one = results.interval([0.5])
    assert (one.mean, one.low, one.high) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="run a method first"):
        results.interval([])


def test_five_subjects_are_inside_as_often_as_it_says():
    """Of 4,000 draws; five bootstrapped subjects would be in 83 %."""
    drawn = np.random.default_rng(0).normal(size=(4000, 5))
    inside = [found.low < 0 < found.high for found in map(results.interval, drawn.tolist())]
    assert 0.94 < np.mean(inside) < 0.96


def test_only_seeds_that_both_have_are_compared():
    some = [
        result("m", "a", 0, 0.2), result("m", "a", 1, 0.8), result("m", "b", 0, 0.4),
        result("n", "a", 0, 0.3), result("n", "b", 0, 0.5), result("n", "b", 1, 9.0),
    ]  # fmt: skip
    assert results.shared_runs(some, "m", "n") == {("a", 0), ("b", 0)}
    gained = results.paired(some, "m", "n", lambda one: one.likeness)
    assert gained is not None and gained.mean == pytest.approx(0.1)


def test_the_front_lies_between_two_sizes_and_never_falls():
    front = [Point("c", 1000, 0.4, 1), Point("a", 10, 0.2, 1), Point("b", 100, 0.6, 1)]

    def at(nbytes: float) -> float:
        return results.front_at(front, nbytes, lambda point: point.likeness)

    assert at(5) == pytest.approx(0.2) and at(10) == pytest.approx(0.2)
    assert at(10**1.5) == pytest.approx(0.4)
    assert at(100) == pytest.approx(0.6) and at(1e6) == pytest.approx(0.6)


def test_ranks_that_follow_subjects_are_told_from_those_that_follow_seeds():
    ranks = {"a": {"x": 1, "y": 8}, "b": {"x": 8, "y": 1}}
    some = [result("m", s, seed, learnt=ranks[s]) for s in ("a", "b") for seed in (0, 1)]
    found = results.rank_test(some, "m")
    assert found is not None and (found.within, found.between) == (0, 3)
    assert 0.2 < found.chance < 0.5, "two of two and two: one draw in three"
    assert results.rank_test(some[:1], "m") is None
    many = [
        result("m", s, seed, learnt=ranks[s[0]])
        for s in ("a1", "b1", "a2", "b2")
        for seed in range(3)
    ]
    apart = results.rank_test(many, "m")
    assert apart is not None and apart.chance < 0.05
    alike = [result("m", s, seed, learnt={"x": 1 + seed}) for s in "abcd" for seed in range(3)]
    same = results.rank_test(alike, "m")
    assert same is not None and same.chance > 0.5


def record(method: str, subject: str, seed: int = 0, **more) -> dict:
    settings = {"subject": subject, "method": method, "seed": seed, "rate": 0.004, "base": "w"}
    scores = {"a": {"likeness": [0.25, 0.5]}, "b": {"likeness": [0.5, 0.75], "place": [1, 0]}}
    return {"settings": settings, "scores": scores, **more}


def test_an_archive_gives_back_what_it_was_given(tmp_path: Path):
    given = [
        record("fixed-8", "mug", ranks={"x": 3, "y": 8}, bytes=99, seconds=1.5, loss=0.125),
        record("base", "cat"),
        record("balanced", "mug", 2, ranks={"x": 3}, learnt={"x": 4, "z": 1}, bytes=12),
    ]
    for one in given:
        own = one["settings"]
        name = f"{own['method']}-0.004-{own['seed']}.json"
        file = tmp_path / "run" / "records" / own["subject"] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(one))
    kept = tmp_path / "kept" / "run.jsonl"
    assert archive.write(tmp_path / "run", kept) == 3
    read, wanted = ([json.dumps(one, sort_keys=True) for one in some]
                    for some in (archive.read(kept), given))  # fmt: skip
    assert sorted(read) == sorted(wanted)
    first = sorted(tmp_path.glob("run/records/*/*.json"))[0]
    first.unlink()
    archive.unpack(kept, tmp_path / "run")
    assert archive.write(tmp_path / "run", tmp_path / "again.jsonl") == 3
    assert (tmp_path / "again.jsonl").read_bytes() == kept.read_bytes()
    assert len(results.read(kept)) == len(results.read(tmp_path / "run")) == 3
