"""`python -m idm_fast.demo`: the split of photographs, what it writes and prints, and what it refuses."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from idm_fast import IDM, demo
from idm_fast.outputs import InputError


def test_no_held_out_photograph_is_trained_on(tmp_path: Path):
    training, held_out = demo.write_photographs(tmp_path)
    trained = {path.stem for path in training.iterdir()}
    assert len(trained) == len(demo.TRAINING_PHOTOGRAPHS)
    assert len(held_out) == len(demo.HELD_OUT_PHOTOGRAPHS) == 3
    assert not trained & {path.stem for path in held_out}


def test_photographs_are_readable_and_held_out_ones_are_gray_squares(tmp_path: Path):
    training, held_out = demo.write_photographs(tmp_path)
    for path in training.iterdir():
        with Image.open(path) as photograph:
            photograph.load()
    for path in held_out:
        with Image.open(path) as photograph:
            assert photograph.size == (256, 256) and photograph.mode == "L"


def test_a_photograph_that_scikit_image_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "TRAINING_PHOTOGRAPHS", ("astronaut.png", "not_there.png"))
    with pytest.raises(InputError, match="without not_there.png"):
        demo.write_photographs(tmp_path / "photographs")
    assert not (tmp_path / "photographs").exists()


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_a_length_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str
):
    assert demo.main(["--output_dir", str(tmp_path / "out"), "--seconds", seconds]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--seconds" in said
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").write_text("a file")
    assert demo.main(["--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path):
    photographs, _ = demo.write_photographs(tmp_path / "photographs")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="something else"):
        demo.train_for(1, photographs, folder)
    assert (folder / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
def test_demo_trains_reconstructs_and_says_where_everything_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.setattr(demo, "SPEED_TRIAL_STEPS", 2)
    out = tmp_path / "out"
    assert demo.main(["--output_dir", str(out), "--seconds", "1"]) == 0
    said = capsys.readouterr().out
    for name in ("demo.png", "results.csv", "weights", "photographs"):
        assert (out / name).exists() and str(out / name) in said
    for ratio in ("10%", "25%", "50%"):
        assert f"{ratio} of the measurements" in said
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["name"] for row in rows} == {"camera.png", "chelsea.png", "coffee.png"}
    for row in rows:
        assert f"{float(row['psnr']):.2f}" in said and f"{float(row['ssim_adjoint']):.4f}" in said
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 4 * 256 and picture.height > 9 * 256
    assert list(IDM.from_pretrained(out / "weights").config.trained_ratios) == [0.1, 0.25, 0.5]

    # Again, over its own output.
    monkeypatch.setattr(demo, "RATIOS", (0.5,))
    monkeypatch.setattr(demo, "HELD_OUT_PHOTOGRAPHS", ("camera.png",))
    (result,) = demo.demonstrate(out, 1)
    assert result.ratio == 0.5 and list(IDM.from_pretrained(out / "weights").config.trained_ratios) == [0.5]
