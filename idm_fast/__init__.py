"""Invertible Diffusion Models for compressed sensing, with reversible layers that invert and recompute instead of storing.

Names are imported on first use, so that `import idm_fast` stays light and the reversible layers never load diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BlockCompressedSensing": "idm_fast.physics",
    "IDM": "idm_fast.models",
    "IDMPipeline": "idm_fast.pipeline",
    "ReversibleSequence": "idm_fast.reversible",
    "WiredSequence": "idm_fast.reversible",
    "make_reversible": "idm_fast.reversible",
    "use": "idm_fast.ops",
}

__all__ = ["IDM", "BlockCompressedSensing", "IDMPipeline", "ReversibleSequence", "WiredSequence", "make_reversible", "use"]

if TYPE_CHECKING:
    from idm_fast.models import IDM
    from idm_fast.ops import use
    from idm_fast.physics import BlockCompressedSensing
    from idm_fast.pipeline import IDMPipeline
    from idm_fast.reversible import ReversibleSequence, WiredSequence, make_reversible


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'idm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
