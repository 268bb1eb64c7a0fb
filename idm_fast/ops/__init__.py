"""The operators `idm_fast::…`: schema, fake kernel, gradient, reference, and the choice of implementation. See DESIGN §3."""

from idm_fast.ops.bits import pack_bits, unpack_bits
from idm_fast.ops.coupling import couple, decouple, uncouple
from idm_fast.ops.feed_forward import chunked_feed_forward
from idm_fast.ops.fixed_point import fixed_add, fixed_couple, fixed_decouple, fixed_uncouple, from_fixed, to_fixed
from idm_fast.ops.geglu import geglu
from idm_fast.ops.group_norm import group_norm_silu
from idm_fast.ops.injector import inject_couple, inject_read, inject_read_through, inject_write
from idm_fast.ops.layer_norm import layer_norm
from idm_fast.ops.native import load_cpu
from idm_fast.ops.projection import adjoint, gram, measure, project_step
from idm_fast.ops.registry import choose_from_environment, missing, use
from idm_fast.ops.report import report

load_cpu()
choose_from_environment()

__all__ = [
    "adjoint",
    "chunked_feed_forward",
    "couple",
    "decouple",
    "fixed_add",
    "fixed_couple",
    "fixed_decouple",
    "fixed_uncouple",
    "from_fixed",
    "geglu",
    "gram",
    "group_norm_silu",
    "inject_couple",
    "inject_read",
    "inject_read_through",
    "inject_write",
    "layer_norm",
    "measure",
    "missing",
    "pack_bits",
    "project_step",
    "report",
    "to_fixed",
    "uncouple",
    "unpack_bits",
    "use",
]
