"""The choice of implementation: explicit or refused, never hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idm_fast import ops
from idm_fast.ops import native, registry


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_choosing_what_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_cuda", lambda: "no nvcc was found")
    with pytest.raises(RuntimeError, match="'cuda' cannot be used: no nvcc was found"):
        ops.use("cuda")
    assert registry.current_choice() is None


def test_a_missing_implementation_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "load_cpu", lambda: "no C++ compiler was found")
    monkeypatch.setattr(registry, "_logged", set())
    for name in ("couple", "geglu"):
        monkeypatch.delitem(registry.OPS[name].implementations, "cpu", raising=False)
        registry.OPS[name].implementations.chosen.clear()
    h = torch.zeros(2, 4)
    with ops.use("reference"):
        ops.geglu(h)
    assert not caplog.records, "what was chosen explicitly is not missing anything"
    ops.geglu(h)
    ops.geglu(h)
    ops.couple(h, h, torch.ones(1))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name.startswith("idm_fast")
    assert "geglu" in record.getMessage() and "'cpu'" in record.getMessage() and "no C++ compiler" in record.getMessage()


def test_an_op_without_a_kernel_in_an_extension_that_is_there_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load_cpu", lambda: None)
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.delitem(registry.OPS["geglu"].implementations, "cpu", raising=False)
    registry.OPS["geglu"].implementations.chosen.clear()
    ops.geglu(torch.zeros(2, 4))
    assert not caplog.records


def test_what_was_measured_slower_runs_on_explicit_choice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["geglu"]
    monkeypatch.setitem(op.implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 7.0), ("cpu",)))
    monkeypatch.setattr(registry, "MEASURED_SLOWER", {("cpu", "geglu")})
    h = torch.zeros(2, 4)
    assert (ops.geglu(h) == 0).all()
    with ops.use("cpu"):
        assert (ops.geglu(h) == 7).all()


def test_an_explicit_choice_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cuda", (lambda h: h, ("cuda",)))
    monkeypatch.setattr(native, "load_cuda", lambda: None)
    with ops.use("cuda"), pytest.raises(RuntimeError, match="'cuda' implementation of idm_fast::geglu serves .* on 'cpu'"):
        ops.geglu(torch.zeros(2, 4))
    assert registry.current_choice() is None


def test_the_automatic_choice_is_the_first_in_the_order_that_the_op_has_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["geglu"]
    here = {name: (lambda h: h, ("here",)) for name in registry.ORDER[:-1]} | {"reference": (lambda h: h, None)}
    monkeypatch.setattr(op, "implementations", here)
    assert op.choose("elsewhere") == "reference", "the others serve another device"
    for name in registry.ORDER:
        assert op.choose("here") == name
        del here[name]
    with pytest.raises(RuntimeError, match="idm_fast::geglu has no implementation for device type 'here'"):
        op.choose("here")


def test_nothing_untimed_is_taken_on_a_gpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_logged", set(registry.ORDER))
    for op in registry.OPS.values():
        monkeypatch.setitem(op.implementations, "cuda", (lambda *a: a, ("cuda",)))
        monkeypatch.setitem(op.implementations, "triton", (lambda *a: a, ("cuda", "cpu")))
        assert op.choose("cuda") == "reference" and op.choose("cpu") != "triton"


def test_unknown_implementation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RuntimeError, match="unknown implementation; known are cuda, triton, cpu, reference"):
        ops.use("quick")


def test_use_is_a_context_manager_that_puts_the_choice_back() -> None:
    with ops.use("reference"):
        assert registry.current_choice() == "reference"
        with ops.use(None):
            assert registry.current_choice() is None
        assert registry.current_choice() == "reference"
    assert registry.current_choice() is None


def test_use_is_a_function_that_holds_until_the_next() -> None:
    try:
        ops.use("reference")
        assert registry.current_choice() == "reference"
        with pytest.raises(RuntimeError):
            ops.use("quick")
        assert registry.current_choice() == "reference", "what was refused changes nothing"
    finally:
        ops.use(None)
    assert registry.current_choice() is None


def test_the_choice_is_put_back_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), ops.use("reference"):
        raise ZeroDivisionError
    assert registry.current_choice() is None


def test_a_failure_inside_an_explicit_choice_is_not_hidden_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(h: torch.Tensor) -> torch.Tensor:
        raise FloatingPointError("here")

    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cpu", (fails, ("cpu",)))
    for choice in ("cpu", None):
        with ops.use(choice), pytest.raises(FloatingPointError, match="here"):
            ops.geglu(torch.zeros(2, 4))


def test_an_added_implementation_is_taken_automatically_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["geglu"]
    monkeypatch.setitem(op.implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 7.0), ("cpu",)))
    monkeypatch.delitem(registry.OPS["couple"].implementations, "cpu", raising=False)
    h = torch.zeros(2, 4)
    assert (ops.geglu(h) == 7).all()
    with ops.use("reference"):
        assert (ops.geglu(h) == 0).all()
    row = next(row for row in ops.report(("cpu",)) if row.op == "geglu")
    assert (row.implementation, row.available) == ("cpu", ("cpu", "reference"))
    with ops.use("cpu"), pytest.raises(RuntimeError, match="idm_fast::couple has no 'cpu' implementation here"):
        ops.couple(h, h, torch.ones(1))


@pytest.fixture
def geglu_of_seven(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """An argument of geglu, for which its "cpu" implementation returns 7 and the reference 0."""
    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 7.0), ("cpu",)))
    return torch.zeros(2, 4)


def test_a_mapping_chooses_op_by_op_and_leaves_the_others_automatic(
    monkeypatch: pytest.MonkeyPatch, geglu_of_seven: torch.Tensor
) -> None:
    h = geglu_of_seven
    automatic = registry.OPS["couple"].choose("cpu")
    with ops.use({"geglu": "reference"}):
        assert (ops.geglu(h) == 0).all() and registry.OPS["couple"].choose("cpu") == automatic
        assert registry.OPS["geglu"].runs_reference("cpu")
        with ops.use({"geglu": "cpu", "couple": "reference"}):
            assert (ops.geglu(h) == 7).all() and registry.OPS["couple"].choose("cpu") == "reference"
            assert not registry.OPS["geglu"].runs_reference("cpu")
        assert (ops.geglu(h) == 0).all()
    assert (ops.geglu(h) == 7).all()


def test_equal_mappings_are_one_choice() -> None:
    """What is remembered by choice does not grow with every `with use({...})`."""
    op = registry.OPS["geglu"]
    for _ in range(3):
        with ops.use({"geglu": "reference", "couple": "reference"}):
            ops.geglu(torch.zeros(2, 4))
            remembered = len(op.implementations.chosen)
        with ops.use({"couple": "reference", "geglu": "reference"}):
            ops.geglu(torch.zeros(2, 4))
        assert len(op.implementations.chosen) == remembered


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"conjure": "reference"}, "there is no op 'conjure'; known are .*couple, "),
        ({"couple": "quick"}, "couple has no 'quick' implementation here: unknown implementation; known are cuda"),
    ],
)
def test_a_mapping_that_cannot_be_met_is_refused_and_changes_nothing(names: dict[str, str], message: str) -> None:
    with ops.use("reference"):
        with pytest.raises(RuntimeError, match=message):
            ops.use(names)
        assert registry.current_choice() == "reference"


def test_a_file_chooses_op_by_op_and_is_named_in_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, geglu_of_seven: torch.Tensor
) -> None:
    path = tmp_path / "fastest.json"
    path.write_text('{"device": "a processor", "ops": {"geglu": "reference"}}')
    assert (ops.geglu(geglu_of_seven) == 7).all()
    monkeypatch.setattr(registry, "_choice", None)
    monkeypatch.setenv("IDM_FAST_IMPL", str(path))
    registry.choose_from_environment()
    assert (ops.geglu(geglu_of_seven) == 0).all()
    reasons = {row.op: row.reason for row in ops.report(("cpu",))}
    assert reasons.pop("geglu") == "chosen explicitly (fastest.json, measured on a processor)"
    assert not any("explicitly" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "expected"),
        ('{"ops": {}}', "expected"),
        ('{"ops": {"couple": 1}}', "expected"),
    ],
)
def test_a_file_that_holds_no_choice_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "fastest.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RuntimeError, match=rf"fastest\.json: {message}"):
        ops.use(path)
    assert registry.current_choice() is None


@pytest.mark.parametrize(("value", "choice"), [("reference", "reference"), ("auto", None), ("", None)])
def test_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch, value: str, choice: str | None) -> None:
    monkeypatch.setattr(registry, "_choice", None)
    monkeypatch.setenv("IDM_FAST_IMPL", value)
    registry.choose_from_environment()
    assert registry.current_choice() == choice


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_environment_variable_that_cannot_be_met_is_named() -> None:
    environment = os.environ | {"IDM_FAST_IMPL": "cuda"}
    run = subprocess.run(
        [sys.executable, "-c", "import idm_fast.ops"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert "environment variable IDM_FAST_IMPL=cuda" in run.stderr
