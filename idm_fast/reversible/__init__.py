"""Drop-in reversible layers: they need torch alone and know nothing of diffusion. See DESIGN §4."""

from idm_fast.reversible.convert import make_reversible
from idm_fast.reversible.coupling import AdditiveCoupling, ConvexCoupling
from idm_fast.reversible.residual import ResidualBranch
from idm_fast.reversible.segment import kept, recompute
from idm_fast.reversible.sequence import ChainEnd, ReversibleSequence, WiredSequence
from idm_fast.reversible.streams import ExactOutputs

__all__ = [
    "AdditiveCoupling",
    "ChainEnd",
    "ConvexCoupling",
    "ExactOutputs",
    "ResidualBranch",
    "ReversibleSequence",
    "WiredSequence",
    "kept",
    "make_reversible",
    "recompute",
]
