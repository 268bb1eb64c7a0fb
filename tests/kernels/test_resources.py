"""Every launch compiles to machine code without a GPU, spills nothing, and takes what resources.csv says."""

from __future__ import annotations

import importlib.util

import pytest

from idm_fast import kernels

if kernels.interpreted() or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs Triton and its compiled, not interpreted, functions", allow_module_level=True)

from idm_fast.kernels import resources


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
def test_every_kernel_compiles_without_spills_as_recorded(
    arch: int, part: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two parts, which two processes share better than three architectures."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    launches = list(resources.recorded_launches(arch))[part::2]
    rows = [resources.compiled(variant, entry, arch) for variant, entry in launches]
    assert not [row for row in rows if row.spilled]
    compiler, record = resources.read()
    expected = {row for row in record if (row.kernel, row.variant, row.arch) in {(r.kernel, r.variant, r.arch) for r in rows}}
    if compiler == resources.compiler():
        assert set(rows) == expected, "python -m idm_fast.kernels.resources --write records a change that is meant"
    else:  # another compiler allocates otherwise; what is compiled stays the same
        assert len(rows) == len(expected)


def test_record_holds_every_kernel_and_no_case_twice() -> None:
    names = [(row.kernel, row.variant, row.arch) for row in resources.read()[1]]
    assert len(names) == len(set(names))
    launched = {
        (entry.kernel.__name__, variant, arch)
        for arch in resources.ARCHITECTURES
        for variant, entry in resources.recorded_launches(arch)
    }
    assert launched == set(names)
    found = {name for name, *_ in names}
    assert found >= {"couple_bwd_kernel", "geglu_bwd_kernel", "layer_norm_bwd_kernel", "write_bwd_kernel", "step_bwd_kernel"}
