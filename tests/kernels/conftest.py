"""Kernels run on a GPU where there is one, and on CPU tensors in Triton's interpreter where TRITON_INTERPRET=1 is set.

The interpreter must be chosen before anything imports Triton, and then changes everything that uses Triton in the process.
So those tests are left out of an ordinary session, where test_interpreter.py runs them in a process of their own. To run
one of them by hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_couple.py -m "not gpu"
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from idm_fast import kernels

# What cuBLAS asks for where PyTorch's algorithms must be deterministic, as `poisoned_outputs` makes them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device on which the kernels of a test run."""
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kernels.interpreted():
        return
    here = Path(__file__).parent

    def needs_interpreter(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        return here in item.path.parents and callspec is not None and callspec.params.get("device") == "cpu"

    config.hook.pytest_deselected(items=[item for item in items if needs_interpreter(item)])
    items[:] = [item for item in items if not needs_interpreter(item)]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty and its kin give NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off what it stores as bfloat16; a GPU rounds to nearest, and errors are held to that."""
    if not kernels.interpreted():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar in (tl.float32, tl.float64) and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
            return TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, to)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)


@pytest.fixture(autouse=True)
def language_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions into Triton's language again at every call of a device function, which takes a
    third of its time; here only what the launch has not patched yet."""
    if not kernels.interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    patched: set[str] = set()

    class Scope:
        def __init__(self, scope: Any) -> None:
            self._scope = scope

        def restore(self) -> None:
            patched.clear()
            self._scope.restore()

    @functools.cache
    def modules(function: Any) -> set[str]:
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def patch_once(function: Any) -> Any:
        if modules(function) <= patched:
            return None
        patched.update(modules(function))
        return Scope(patch_language(function))

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
