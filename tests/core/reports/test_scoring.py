"""The paper's aggregation, and judges that say what transformers itself says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import cli
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.reports import scoring, vision
from lora2_pack.lora2_core.reports.scoring import Likeness, Obedience, Subject
from lora2_pack.lora2_core.reports.vision import JudgeError
from lora2_pack.tests.core import judges
from lora2_pack.tests.core.judges import WORDS
from PIL import Image

torch.set_num_threads(1)


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def by_brightness(pictures) -> torch.Tensor:
    """A network whose features point along the first axis for white, the second for black."""
    light = torch.tensor([float(np.asarray(one).mean()) / 255 for one in pictures])
    return torch.stack([light, 1 - light], 1)


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, level, level))


WHITE, BLACK, GREY = plain(255), plain(0), plain(128)


def test_prompts_and_subjects_count_alike_however_many_pictures_they_have():
    judge = Likeness("light", "toy", by_brightness)
    one = Subject("one", [WHITE], {"p": [WHITE, WHITE, WHITE, WHITE], "q": [BLACK]})
    two = Subject("two", [WHITE, BLACK], {"p": [WHITE]})
    (found,) = scoring.score([one, two], [judge])
    assert found.prompts["one"] == {"p": pytest.approx(1), "q": pytest.approx(0, abs=1e-6)}
    assert found.subjects == {"one": pytest.approx(0.5), "two": pytest.approx(0.5)}
    assert found.mean == pytest.approx(0.5)
    assert found.pictures == 6 and (found.metric, found.judge) == ("light", "toy")


def test_every_picture_is_compared_with_every_photo():
    judge = Likeness("light", "toy", by_brightness)
    given = judge.judge(Subject("one", [WHITE, BLACK, GREY], {"p": [WHITE], "none": []}))
    grey = by_brightness([GREY])[0]
    assert given == {"p": [pytest.approx((1 + 0 + float(grey[0] / grey.norm())) / 3, rel=1e-5)]}


@pytest.mark.parametrize(
    ("without", "asked"),
    [("", "a sks mug on sks"), ("sks", "a mug on"), ("a sks", "mug on sks"), ("cat", None)],
)
def test_the_subjects_word_is_cut_out(without: str, asked: str | None):
    judge = Obedience("CLIP-T", "toy", by_brightness, lambda texts: torch.ones(1, 2), without)
    assert judge.asked("a sks mug on sks") == (asked or "a sks mug on sks")


def test_each_picture_is_held_against_its_own_prompt():
    texts = {"light": [1.0, 0.0], "dark": [0.0, 1.0]}
    judge = Obedience(
        "T", "toy", by_brightness, lambda asked: torch.tensor([texts[one] for one in asked])
    )
    given = judge.judge(Subject("s", [GREY], {"dark": [BLACK, WHITE], "": [], "light": [WHITE]}))
    assert given["dark"] == pytest.approx([1, 0]) and given["light"] == pytest.approx([1])


def test_a_subject_needs_photos_and_pictures():
    with pytest.raises(ConfigError, match="mug has no photo"):
        Subject("mug", [], {"p": [WHITE]})
    with pytest.raises(ConfigError, match="mug has no painted picture"):
        Subject("mug", [WHITE], {"p": []})
    with pytest.raises(ConfigError, match="no subject"):
        scoring.score([], [Likeness("light", "toy", by_brightness)])
    with pytest.raises(ConfigError, match="no judge"):
        scoring.score([Subject("mug", [WHITE], {"p": [WHITE]})], [])


# --- transformers' own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.make_dino(tmp_path_factory.mktemp("judges") / "dino")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.make_clip(tmp_path_factory.mktemp("judges") / "clip")


def test_dino_is_the_class_token_of_transformers_pipeline(dino: Path):
    from transformers import pipeline

    pictures = [picture(seed) for seed in range(20)]  # more than one part
    extract = pipeline("image-feature-extraction", model=str(dino))
    wanted = torch.stack([torch.tensor(extract(one))[0, 0] for one in pictures])
    found = vision.Dino(dino)(pictures)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (scoring.cosines(found, found) < 0.999).any(), "pictures must differ to judges"


def test_clip_is_that_of_transformers(clip: Path):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    pictures = [picture(seed) for seed in range(5)]
    prompts = ["a mug on the beach", "a sks mug in the snow " + "snow " * 40]
    model = CLIPModel.from_pretrained(clip)
    pixels = AutoImageProcessor.from_pretrained(clip)(images=pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(**pixels, **tokens)
    subject = Subject("mug", pictures[:2], {prompt: pictures for prompt in prompts})
    likeness, obedience = vision.judges(None, clip)
    logits = torch.tensor([obedience.judge(subject)[prompt] for prompt in prompts])
    assert torch.allclose(logits * model.logit_scale.exp(), wanted.logits_per_text, atol=1e-3)
    pairs = wanted.image_embeds @ wanted.image_embeds[:2].T
    assert likeness.judge(subject)[prompts[0]] == pytest.approx(pairs.mean(1).tolist(), abs=1e-5)


def test_pickled_weights_are_not_read(dino: Path, tmp_path: Path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((dino / name).read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(JudgeError, match="pickled cannot be used as a judge"):
        vision.judges(folder, None)


def test_a_judge_whose_weights_are_not_all_there_is_none(clip: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip, tmp_path / "half"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(JudgeError, match="1 of its weights are not in the file"):
        vision.judges(None, folder)


@pytest.mark.parametrize("name", ["nobody/never-downloaded", "../secret", "/etc", "a/b/c", ""])
def test_what_is_not_there_is_not_fetched(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(JudgeError, match=r"cache on this machine|no name of a network"):
        vision.cached(name)


def test_the_command(dino: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    painted, real = tmp_path / "painted", tmp_path / "real"
    for subject in ("mug", "vase"):
        (real / subject).mkdir(parents=True)
        picture(ord(subject[0])).save(real / subject / "a.JPG")
        for number in range(2):
            folder = painted / subject / str(number)
            folder.mkdir(parents=True)
            (folder / "prompt.txt").write_text(f"a sks {WORDS[number + 5]}\n")
            picture(number).save(folder / "x.png")
    arguments = ["score", str(painted), str(real), "--dino", str(dino), "--clip", str(clip)]
    assert cli.main([*arguments, "--without", "sks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["metric"] for one in found] == ["DINO", "CLIP-I", "CLIP-T"]
    assert {one["judge"] for one in found} == {"dino", "clip"}
    assert set(found[0]["prompts"]["mug"]) == {"a sks beach", "a sks in"}
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "Mean of subjects" in text and f"{found[0]['mean']:.4f}" in text
    (painted / "mug" / "0" / "x.png").write_text("no picture")
    assert cli.main(arguments) == 1
    assert "x.png is not a readable image" in capsys.readouterr().err
    (painted / "mug" / "0" / "prompt.txt").unlink()
    assert cli.main(arguments) == 1
    assert "prompt.txt is missing" in capsys.readouterr().err
    assert cli.main(["score", str(painted), str(tmp_path / "gone")]) == 1
    assert "gone is no folder" in capsys.readouterr().err
