"""Every launch compiles to machine code without a GPU, spills nothing, and takes what resources.csv says."""

from __future__ import annotations

import importlib.util

import pytest

from idm_fast import kernels

if kernels.interpreted() or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs Triton and its compiled, not interpreted, functions", allow_module_level=True)

from idm_fast.kernels import resources


@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
def test_every_kernel_compiles_without_spills_as_recorded(
    arch: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    rows = [resources.compiled(variant, entry, arch) for variant, entry in resources.recorded_launches(arch)]
    assert not [row for row in rows if row.spilled]
    compiler, record = resources.read()
    expected = {row for row in record if row.arch == arch}
    if compiler == resources.compiler():
        assert set(rows) == expected, "python -m idm_fast.kernels.resources --write records a change that is meant"
    else:  # another compiler allocates otherwise; what is compiled stays the same
        assert {(row.kernel, row.variant) for row in rows} == {(row.kernel, row.variant) for row in expected}


def test_record_holds_every_kernel_and_no_case_twice() -> None:
    names = [(row.kernel, row.variant, row.arch) for row in resources.read()[1]]
    assert len(names) == len(set(names))
    launched = {entry.kernel.__name__ for _, entry in resources.recorded_launches(90)}
    assert launched == {name for name, *_ in names}
    assert launched >= {"couple_bwd_kernel", "geglu_bwd_kernel", "input_gradient_kernel", "write_bwd_kernel", "step_bwd_kernel"}
