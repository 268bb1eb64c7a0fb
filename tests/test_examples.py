"""Every example runs from its own folder as a user would start it, and writes what it promises."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, out: Path) -> str:
    """Standard output of the quick run."""
    command = [sys.executable, str(ROOT / "examples" / script), "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["reversible_resnet.py", "reversible_vit.py"])
def test_comparison_of_a_plain_and_a_reversible_network(script: str, tmp_path: Path) -> None:
    printed = run(script, tmp_path)
    plain, reversible, *converted = rows(tmp_path / "results.csv")
    assert (plain["network"], reversible["network"]) == ("plain", "reversible")
    assert [row["network"] for row in converted] == [f"plain's weights made reversible, scale {s}" for s in (1, 2)]
    assert plain["parameters"] == reversible["parameters"]
    assert float(reversible["peak_mib"]) < 0.25 * float(plain["peak_mib"])
    assert 1 < float(reversible["gflop"]) / float(plain["gflop"]) < 1.34
    for row in (plain, reversible):
        assert f"| {row['network']} | {int(row['parameters']):,} | {float(row['peak_mib']):.1f} MiB |" in printed
        assert float(row["ms_per_step"]) > 0 and 0 <= float(row["test_accuracy"]) <= 1
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_memory_against_depth(tmp_path: Path) -> None:
    printed = run("when_it_pays.py", tmp_path)
    memory = {(row["block"], row["training"]): (float(row["2"]), float(row["4"])) for row in rows(tmp_path / "memory.csv")}
    large = "convolution, large (64 channels, 32²)"
    assert memory[large, "reversible"][1] < memory[large, "plain"][1]
    assert f"| {large} | plain |" in printed
    assert {row["block"] for row in rows(tmp_path / "time.csv")} == {block for block, _ in memory}
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_no_pixel_is_both_trained_and_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import comparison
    import torch

    patches = comparison.Patches.load()
    labels = set(range(len(comparison.PHOTOGRAPHS)))
    assert {label for _, label in patches.train} == {label for _, label in patches.test} == labels
    regions = [(band.untyped_storage().data_ptr(), band.storage_offset()) for band, _ in [*patches.train, *patches.test]]
    for storage in {pointer for pointer, _ in regions}:
        lefts = sorted(left for pointer, left in regions if pointer == storage)
        assert all(right - left >= comparison.BAND + comparison.GAP for left, right in zip(lefts, lefts[1:], strict=False))
    x, y = patches.held_out(stride=16)
    assert x.shape[1:] == (1, 32, 32) and len(x) == len(y) and set(y.tolist()) == labels
    first, again = (patches.batch(4, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
