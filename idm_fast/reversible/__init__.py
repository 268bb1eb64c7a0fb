"""Drop-in reversible layers: they need torch alone and know nothing of diffusion. See DESIGN §4."""

from idm_fast.reversible.convert import make_reversible
from idm_fast.reversible.coupling import AdditiveCoupling, ConvexCoupling
from idm_fast.reversible.residual import ResidualBranch
from idm_fast.reversible.sequence import ReversibleSequence, WiredSequence

__all__ = [
    "AdditiveCoupling",
    "ConvexCoupling",
    "ResidualBranch",
    "ReversibleSequence",
    "WiredSequence",
    "make_reversible",
]
