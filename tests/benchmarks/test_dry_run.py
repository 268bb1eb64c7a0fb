"""What a run on a GPU does, gone through on a CPU: every case's branches for "cuda", with networks and sizes of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pretend_gpu import pretend_gpu
from test_training_cases import NARROW, in_this_process, known_count

from benchmarks import __main__ as suite
from benchmarks import contenders, machine, report
from benchmarks.case import Case, Context, Result
from benchmarks.cases import attention, inference, kernels, memory, quality, scaling, training_step
from benchmarks.contenders import Setting
from idm_fast import IDM
from idm_fast.evaluation.ddnm import adm_unet
from idm_fast.ops.choice import read_choice
from idm_fast.ops.registry import OPS

QUICK = Context("cuda", True)
TINY = Setting(2, 2, 32, NARROW)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, counts that are known, and samples that take no time."""
    for module in (memory, training_step, scaling):
        monkeypatch.setattr(module, "count", known_count)
        monkeypatch.setattr(module, "counters", in_this_process)
    for module in (memory, training_step, scaling, inference, kernels, attention):
        if hasattr(module, "take_turns"):
            monkeypatch.setattr(module, "take_turns", few_samples(module.take_turns))
    contenders.oracle.cache_clear()
    contenders.allowed_error.cache_clear()
    with pretend_gpu(monkeypatch):
        assert contenders.missing_kernels("cuda") == ["cuda: a pretended GPU runs no CUDA"]
        for module in (kernels, inference):
            monkeypatch.setattr(module, "missing_kernels", lambda device: [])
        yield
    contenders.oracle.cache_clear()
    contenders.allowed_error.cache_clear()


def few_samples(take_turns: Callable[..., Any]) -> Callable[..., Any]:
    def once(functions: Any, device: str, seconds: float, failed: Any = None, **how: Any) -> Any:
        return take_turns(functions, device, 0.0, least=1, failed=failed)

    return once


def complete(result: Result, tmp_path: Path) -> Result:
    """Nothing failed, and a report can be made of it."""
    assert not result.failures, result.failures
    assert result.tables and all(table.rows for table in result.tables)
    data = {"case": "memory", "question": "?", "quick": True, "seconds": 1.0, "machine": machine.describe("cuda")}
    report.write_case(tmp_path, json.loads(json.dumps(data | {"result": result.as_json()})))
    return result


@pytest.mark.slow
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is counted is known for the published setting; what is measured is a narrow network.
    monkeypatch.setattr(memory, "_settings_on_gpu", lambda context, base: [base])
    peak = memory.peak_on_gpu
    monkeypatch.setattr(memory, "peak_on_gpu", lambda run: peak(run._replace(setting=TINY)))
    result = complete(memory.memory(QUICK), tmp_path)
    measured = result.tables[-1]
    assert measured.title == "Counted and measured peaks"
    assert len(measured.rows) == len(contenders.THEIRS) + 2 * len(contenders.OURS), "ours with plain PyTorch and with kernels"


@pytest.mark.slow
def test_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "Setting", lambda *_: TINY)
    path = tmp_path / "fastest_here.json"
    path.write_text('{"ops": {"geglu": "reference"}}')
    result = complete(training_step.training_step(replace(QUICK, fastest=path)), tmp_path)
    assert "published" in result.plots[0].title
    rows = [str(row[0]) for row in result.tables[0].rows]
    assert {"ours, two_level (fastest ops)", "ours, flat + attention kept (fastest ops)"} <= set(rows)
    assert sum("channels_last" in str(row[0]) for row in result.tables[0].rows) == len(training_step.NHWC)


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "IDM", partial(IDM, **NARROW))
    small = {"block_out_channels": (32, 32, 64, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}
    monkeypatch.setattr(inference, "adm_unet", partial(adm_unet, **small, attn_norm_num_groups=8))
    monkeypatch.setattr(inference, "SIZES_ON_GPU", (64,))
    result = complete(inference.run(QUICK), tmp_path)
    ways = [str(row[0]) for row in result.tables[0].rows]
    assert len(ways) == len(set(ways)) == 3 + 2 * 4
    assert {"IDM, float32, eager", "IDM, bfloat16, channels last, triton ops, CUDA graph"} <= set(ways)


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "levels", lambda context: [kernels.Level(1, 32, 16, 4)])
    monkeypatch.setattr(kernels, "COMPILED_QUICKLY", ())
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: [1e12])
    monkeypatch.setattr(kernels, "matrix_rate", lambda device, dtype: [1e14])
    result = complete(kernels.run(QUICK), tmp_path)
    assert set(result.fastest) == set(OPS) and len(result.tables[-1].rows) == len(OPS)


def test_what_was_fastest_is_handed_to_the_cases_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Context] = []

    def compares(context: Context) -> Result:
        seen.append(context)
        return Result(fastest={"geglu": "reference"})

    cases = {name: Case(name, "?", compares, ("cuda",), (1, 1)) for name in ("kernels", "inference")}
    monkeypatch.setattr(suite, "load_cases", lambda: cases)
    for name in cases:
        assert suite.main(["--device", "cuda", "--one", name, "--out", str(tmp_path)]) == 0
    first, second = (context.fastest for context in seen)
    assert first is None and second is not None
    choice = read_choice(second)
    assert choice.names == {"geglu": "reference"} and str(choice) == "fastest.json, measured on a pretended GPU"


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KERNELS", ["flash"])
    result = complete(attention.compare(QUICK, ((40, 64), (80, 32)), 1), tmp_path)
    assert result.notes[0].startswith("Fastest at d = 40, 64 tokens: flash")


def test_a_wrong_attention_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KERNELS", ["flash"])
    right = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, k, v: right(q, k, v) * 1.02)
    result = attention.compare(QUICK, ((40, 64),), 1)
    assert "flash, d = 40, 64 tokens: WrongResult" in result.failures[0] and not result.measurements


def test_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    monkeypatch.setenv("IDM_BENCH_TEST_DATA", str(folder))
    complete(quality.run(QUICK), tmp_path)


@pytest.mark.slow
def test_scaling_without_a_second_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "Setting", lambda *_: TINY)
    monkeypatch.setattr(scaling, "AXES", {("cuda", True): ((32, 64), (1, 2))})
    result = scaling.scaling(QUICK)
    assert result.failures == ["two processes: NotHere: nccl takes 2 GPUs, and there is 1"]


def test_a_quick_run_says_what_its_minutes_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "build_extension", lambda: "native extension: built")
    assert suite.main(["--device", "cuda", "--quick", "--only", "memory", "--minutes", "0.3", "--out", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "memory.json").read_text())
    assert data["result"]["failures"] == ["left out: the 0.3 minutes of this run were over"]
    assert data["machine"]["device_name"] == "a pretended GPU"
    assert "left out" in (tmp_path / "report.html").read_text()
