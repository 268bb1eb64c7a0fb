"""One schema an op: what the C++ registers is what Python defines, so that a call can go to either."""

from __future__ import annotations

import pytest
import torch

from idm_fast.ops import native
from idm_fast.ops.registry import OPS

pytestmark = pytest.mark.skipif(native.load_cpu() is not None, reason=f"no C++ extension: {native.load_cpu()}")

NATIVE = {
    schema.name.removeprefix("idm_fast_native::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("idm_fast_native::")
}


def test_every_kernel_of_the_extension_has_a_schema() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    kernels = {name.removeprefix("idm_fast_native::") for name in registered if name.startswith("idm_fast_native::")}
    assert kernels and kernels <= NATIVE.keys()


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_native_schema_is_that_of_the_op(name: str) -> None:
    # As text: names, types, order, defaults and what aliases what.
    assert str(NATIVE[name]).removeprefix("idm_fast_native::") == str(OPS[name].overload._schema).removeprefix("idm_fast::")
