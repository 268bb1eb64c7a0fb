"""The fastest implementation of each op, and the file by which a run hands it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fastest
from benchmarks.case import Context, read_run
from benchmarks.contenders import choices, implementations, ours_by_environment, ours_on, references
from idm_fast.ops import registry
from idm_fast.ops.choice import OpByOp, read_choice

MACHINE = {"device_name": "a processor", "commit": "abc", "torch": "2"}


def test_the_least_time_over_all_shapes_wins() -> None:
    times = {
        ("geglu", "small"): {"reference": 1.0, "triton": 0.5, "cuda": 0.6},
        ("geglu", "large"): {"reference": 9.0, "triton": 6.0, "cuda": 5.0},
        ("gram", "small"): {"reference": 1.0, "triton": 2.0},
    }
    chosen = fastest.fastest(times)
    assert chosen == {"geglu": "cuda", "gram": "reference"}
    assert list(fastest.speedups(times, chosen)) == [("geglu", "cuda", pytest.approx(10 / 5.6)), ("gram", "reference", 1.0)]


def test_what_was_wrong_at_one_shape_is_not_taken() -> None:
    times = {("geglu", "small"): {"reference": 2.0, "triton": 0.1}, ("geglu", "large"): {"reference": 2.0}}
    assert fastest.fastest(times) == {"geglu": "reference"}


def test_what_is_inverted_is_inverted_by_what_computed_it() -> None:
    group = fastest.TOGETHER[1]
    times = {(op, "here"): {"reference": 3.0, "triton": 2.0, "cuda": 2.1} for op in group}
    times[group[0], "here"] |= {"cuda": 1.0}
    assert fastest.fastest(times) == dict.fromkeys(group, "cuda")
    del times[group[1], "here"]
    assert fastest.fastest(times) == {}, "one of them was not timed"


def test_the_groups_are_ops_and_every_inverse_is_in_one() -> None:
    tied = [op for group in fastest.TOGETHER for op in group]
    assert len(set(tied)) == len(tied) and set(tied) <= set(registry.OPS)
    inverses = {op for op in registry.OPS if "decouple" in op or "uncouple" in op or op.startswith("unpack")}
    assert inverses <= set(tied)


def test_a_file_is_read_back_and_is_no_result_of_a_case(tmp_path: Path) -> None:
    fastest.write(tmp_path, {"geglu": "reference"}, MACHINE)
    assert [path.name for path in tmp_path.iterdir()] == [fastest.FILE] and read_run(tmp_path) == []
    choice = read_choice(tmp_path / fastest.FILE)
    assert choice.names == {"geglu": "reference"} and str(choice) == "fastest.json, measured on a processor"


def test_later_cases_on_a_gpu_time_it_beside_the_implementations(tmp_path: Path) -> None:
    fastest.write(tmp_path, {"geglu": "reference"}, MACHINE)
    path = tmp_path / fastest.FILE
    known = OpByOp.make({"geglu": "reference"}, "fastest")
    on_cpu, on_gpu = (Context(device, True, fastest=path) for device in ("cpu", "cuda"))
    assert choices(on_cpu) == [*implementations("cpu"), known]
    assert ours_on(on_gpu) is known and ours_by_environment(on_gpu) == {"IDM_FAST_IMPL": str(path)}
    assert ours_on(on_cpu) is None and ours_by_environment(on_cpu) == {}, "there what is automatic was measured"
    assert set(references("cpu", known)) == set(references("cpu", None)) | {"geglu"}
