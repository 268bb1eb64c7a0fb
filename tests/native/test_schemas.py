"""One schema an op: what the C++ registers is what Python defines, so that a call can go to either."""

from __future__ import annotations

import pytest
import torch

from idm_fast.ops import native
from idm_fast.ops.registry import OPS

pytestmark = pytest.mark.skipif(native.load_cpu() is not None, reason=f"no C++ extension: {native.load_cpu()}")

NATIVE = {
    (schema.name.removeprefix("idm_fast_native::"), schema.overload_name): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("idm_fast_native::")
}


def test_every_kernel_of_the_extension_has_a_schema() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    kernels = {name.removeprefix("idm_fast_native::") for name in registered if name.startswith("idm_fast_native::")}
    assert kernels and kernels <= {name for name, overload in NATIVE if not overload}


@pytest.mark.parametrize(("name", "overload"), sorted(NATIVE))
def test_native_schema_is_that_of_the_op(name: str, overload: str) -> None:
    # As text: names, types, order, defaults and what aliases what.
    native_schema = str(NATIVE[name, overload]).removeprefix("idm_fast_native::")
    assert overload in ("", "tf32")
    assert native_schema.replace(f"{name}.tf32(", f"{name}(") == str(OPS[name].overload._schema).removeprefix("idm_fast::")


def test_products_with_the_matrix_and_nothing_else_come_in_tf32_too() -> None:
    with_matrix = {name for name, op in OPS.items() if "Tensor matrix" in str(op.overload._schema)}
    assert {name for name, overload in NATIVE if overload} == with_matrix
