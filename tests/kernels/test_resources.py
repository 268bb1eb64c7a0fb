"""Every launch compiles to machine code without a GPU, spills nothing, and takes what resources.csv says."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from idm_fast import kernels

if kernels.interpreted() or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs Triton and its compiled, not interpreted, functions", allow_module_level=True)

from idm_fast.kernels import bits, couple, fixed_point, geglu, group_norm_silu, inject, layer_norm, project, resources


@pytest.mark.slow
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


def test_couplings_access_16_bytes_at_a_time(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    for variant, entry in resources.recorded_launches(90):
        if variant.startswith(("F fp32", "F bf16, stream fp64")) and entry.kernel.__name__.startswith("couple_"):
            listing = resources.binary(entry, 90).asm["ptx"]
            wide = r"global[\w:.]*\.v4\.b32" if variant.startswith("F fp32") else r"global[\w:.]*\.v2\.b64"
            assert re.search("ld." + wide, listing) and re.search("st." + wide, listing), (entry.kernel.__name__, variant)


def test_kernels_compile_where_every_size_is_one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton makes a constant of an integer that is 1, which the interpreter does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    meta = resources.meta
    image, row, v, permutation = meta(1, 1, 1, 1), meta(1, 1), meta(1), meta(1, dtype=torch.int64)
    injected = (image, image, image, image, meta(1, 3, 1, 1), v)
    with resources.recording(90) as launches:
        couple.couple(image, image, v)
        couple.decouple(image, image, v)
        couple.uncouple(image, image, image, v)
        geglu.geglu_backward(geglu.geglu(meta(1, 2)), meta(1, 2))
        _, mean, rstd = group_norm_silu.group_norm_silu(image, v, v, 1, 1e-5, True, torch.float32)
        group_norm_silu.group_norm_silu_backward(image, image, v, v, mean, rstd, 1, True)
        layer_norm.layer_norm(row, v, v, 1e-5, torch.float32)
        layer_norm.layer_norm_backward(row, row, v, v, row, row)
        project.gram(image, row, permutation)
        project.project_step(image, image, meta(1, 1, 1), row, permutation, v, v)
        project.project_step_backward(image, image, image, meta(1, 1, 1), row, permutation, v, v)
        inject.inject_read(image, image, v, 1)
        inject.inject_read_backward(image, image, image, 1, image)
        inject.inject_write(*injected, 1)
        inject.inject_write_backward(*injected[:5], 1)
        inject.inject_couple(*injected, image, v, 1)
        inject.inject_uncouple(image, image, *injected, v, 1)
        whole = fixed_point.to_fixed(image, 20)
        fixed_point.fixed_add(image, fixed_point.from_fixed(whole, 20, torch.float32), 20, -1)
        _, packed = fixed_point.fixed_couple(image, whole, v, 20, 2)
        fixed_point.fixed_decouple(whole, image, packed, v, 20, 2)
        fixed_point.fixed_uncouple(whole, image, image, packed, v, 20, 2)
        bits.unpack_bits(bits.pack_bits(meta(1, dtype=torch.uint8), 2), 2, 1)
    assert {entry.kernel.__name__ for entry in launches} == {row.kernel for row in resources.read()[1]}
    assert not [entry.kernel for entry in launches if resources.compiled("", entry, 90).spilled]


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
