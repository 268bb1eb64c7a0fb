"""The ops of `idm_fast.ops` in Triton: one file an op, forward and backward kernels and the functions that launch them.

Nothing here imports Triton until `implementations` is called. A GPU runs the kernels; so does, on CPU tensors and very
slowly, Triton's interpreter, when TRITON_INTERPRET=1 stands in the environment before anything imports Triton.

Tried with Triton 3.5.0, 3.6.0 and 3.7.1: every kernel compiles for sm_90 without spills (3.7.1: for sm_80 and sm_100, too), and
its tests pass in the interpreter of 3.6.0 and 3.7.1 (3.5.0: those of GEGLU and LayerNorm). Interpreters of 3.5 and 3.6 fail on
loops with NumPy 2.4 and newer: take 2.3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, rather than a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing_reason() -> str | None:
    """Why Triton kernels cannot run in this process, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (Linux)"
    if not torch.cuda.is_available() and not interpreted():
        return (
            "PyTorch sees no GPU here; to run the kernels on CPU tensors in Triton's interpreter (very slow, for tests), "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    return None


def device_types() -> tuple[str, ...]:
    """Types of the devices whose tensors the kernels take in this process."""
    return ("cuda",) * torch.cuda.is_available() + ("cpu",) * interpreted()


def implementations() -> dict[str, Callable[..., Any]]:
    """The function that launches the kernels of each op, by the op's name; imports Triton."""
    from idm_fast.kernels import bits, couple, fixed_point, geglu, group_norm_silu, inject, layer_norm, project

    return {
        "couple": couple.couple,
        "decouple": couple.decouple,
        "couple_backward": couple.couple_backward,
        "uncouple": couple.uncouple,
        "uncouple_": couple.uncouple_in_place,
        "pack_bits": bits.pack_bits,
        "unpack_bits": bits.unpack_bits,
        "to_fixed": fixed_point.to_fixed,
        "from_fixed": fixed_point.from_fixed,
        "fixed_add": fixed_point.fixed_add,
        "fixed_couple": fixed_point.fixed_couple,
        "fixed_decouple": fixed_point.fixed_decouple,
        "fixed_uncouple": fixed_point.fixed_uncouple,
        "geglu": geglu.geglu,
        "geglu_backward": geglu.geglu_backward,
        "group_norm_silu": group_norm_silu.group_norm_silu,
        "group_norm_silu_backward": group_norm_silu.group_norm_silu_backward,
        "inject_read": inject.inject_read,
        "inject_read_backward": inject.inject_read_backward,
        "inject_write": inject.inject_write,
        "inject_write_backward": inject.inject_write_backward,
        "inject_couple": inject.inject_couple,
        "inject_couple_backward": inject.inject_couple_backward,
        "inject_uncouple": inject.inject_uncouple,
        "inject_uncouple_": inject.inject_uncouple_in_place,
        "layer_norm": layer_norm.layer_norm,
        "layer_norm_backward": layer_norm.layer_norm_backward,
        "measure": project.measure,
        "adjoint": project.adjoint,
        "gram": project.gram,
        "project_step": project.project_step,
        "project_step_backward": project.project_step_backward,
    }
