"""Tables, files and figures say what was measured."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.evaluation.protocol import ImageResult
from idm_fast.evaluation.report import ComparisonRow, comparison_figure, table, write_csv, write_json


@pytest.fixture
def results():
    return [
        ImageResult("short.png", 256, 256, 0.1, 9.123456789, 0.1, 27.5, 0.8, 1.5),
        ImageResult("a_longer_name.png", 31, 4000, 0.1, 7.0, 0.05, math.inf, 1.0, 12.25),
    ]


def test_csv_keeps_all_digits(tmp_path, results):
    with open(write_csv(results, tmp_path / "r.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["short.png", "a_longer_name.png"]
    assert float(rows[0]["psnr_adjoint"]) == 9.123456789 and float(rows[1]["psnr"]) == math.inf
    assert int(rows[1]["width"]) == 4000


def test_json_is_strict_and_says_what_computed_it(tmp_path, results):
    path = write_json(results, {"seed": 2025}, tmp_path / "r.json", "cpu")
    document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["settings"] == {"seed": 2025}
    assert document["environment"]["torch"] == torch.__version__ and document["environment"]["device"].startswith("cpu")
    assert document["averages"]["0.1"]["psnr_adjoint"] == pytest.approx((9.123456789 + 7) / 2)
    assert document["images"][1]["psnr"] is None


def test_table_lines_are_aligned_and_end_in_the_average(results):
    lines = table(results, "ratio 0.1").split("\n")
    assert lines[0] == "ratio 0.1" and lines[-1].startswith("average") and "2 images" in lines[-1]
    assert len({len(line) for line in lines[2:]}) == 1
    assert "8.06" in lines[-1] and "27.50" in lines[3]


def gray(level, size=(220, 300)):
    return torch.full(size, level)


def test_figure_shows_original_adjoint_output_and_five_times_the_error(tmp_path):
    row = ComparisonRow("a.png", adjoint=gray(0.2), output=gray(0.6), original=gray(0.5))
    pixels = np.asarray(Image.open(comparison_figure([row], tmp_path / "f.png")))
    columns = np.array_split(pixels[pixels.shape[0] // 2], 4)
    centers = [int(column[len(column) // 2, 0]) for column in columns]
    assert centers == [128, 51, 153, pytest.approx(0.5 * 255, abs=1)]


def test_figure_without_an_original_has_two_columns(tmp_path):
    row = ComparisonRow("a.npz", adjoint=gray(0.2), output=gray(0.6))
    with_original = ComparisonRow("b.png", gray(0.2), gray(0.6), gray(0.5))
    two = Image.open(comparison_figure([row], tmp_path / "two.png"))
    four = Image.open(comparison_figure([row, with_original], tmp_path / "four.png"))
    assert four.width > 1.9 * two.width - 50 and four.height > 1.8 * two.height - 50


def test_figure_keeps_colour_and_scales_large_images_down(tmp_path):
    red = torch.zeros(3, 1200, 900)
    red[0] = 1
    picture = Image.open(comparison_figure([ComparisonRow("x" * 500, red, red, red)], tmp_path / "f.png"))
    assert picture.width < 4 * 540 and picture.getpixel((200, 300)) == (255, 0, 0)


def test_failed_figure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        comparison_figure([ComparisonRow("a", gray(0.1), gray(0.1))], tmp_path / "none" / "f.png")
    assert list(tmp_path.iterdir()) == []
