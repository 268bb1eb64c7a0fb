"""softmax(qkᵀ/√d)·v by what the library offers: PyTorch's choice among its kernels, or the order that a benchmark found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""By name, in PyTorch's usual order. All but the last never hold the (N, N) probabilities."""

FASTEST: dict[tuple[str, int], str] = {}
"""(device as `device_name` gives it, d) → the kernel that `python -m benchmarks --only attention` found fastest there, forward
and backward in bfloat16. Where there is no entry, PyTorch chooses."""


def device_name(device: torch.device) -> str:
    """A CUDA device by its compute capability, as "sm_90"; others by their type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, N, d) tensors, in their dtype.

    A kernel that `FASTEST` names is tried first, and the others after it in the usual order: one that cannot serve a dtype,
    a layout or a d is passed over.
    """
    first = FASTEST.get((device_name(q.device), q.shape[-1])) if FASTEST else None
    if first is None:
        return F.scaled_dot_product_attention(q, k, v)
    order = sorted(BACKENDS, key=lambda name: name != first)
    with sdpa_kernel([BACKENDS[name] for name in order], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)
