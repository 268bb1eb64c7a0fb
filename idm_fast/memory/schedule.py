"""What backward has of a training step of IDM: which parts are stored, inverted, or run again (DESIGN §5).

A `Schedule` says it for every sampling step, and in a step for every chain of the U-Net; `schedule_for` makes those that have
a name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

SCHEDULES = ("store", "flat", "two_level")
KEEPABLE = {"store": frozenset[str](), "flat": frozenset({"attention"}), "two_level": frozenset({"attention", "steps"})}
CHAINS = ("down 1/2", "down 1/4", "up 1/4", "up 1/2")
"""The chains of the U-Net in the order in which they run, by the resolution that they work at."""

FEED_FORWARD_ROWS = {"flat": None, "two_level": 2**14}
"""Rows (pixels of a batch) of a feed-forward's hidden layer that are held at once; to cut it at all costs FLOP, to cut it finer
launches."""


@dataclass(frozen=True)
class ChainSchedule:
    """One chain of the U-Net.

    Attributes:
        recovery: "invert" (inputs of the layers are recovered, layers run again) or "store" (plain autograd).
        keep_attention: attention outputs are stored, so that attention does not run again.
        feed_forward_rows: how many rows of a feed-forward's hidden layer exist at once, the layer being computed again in
            backward; None: all, and stored.
    """

    recovery: Literal["invert", "store"] = "invert"
    keep_attention: bool = False
    feed_forward_rows: int | None = None


@dataclass(frozen=True)
class StepSchedule:
    """One sampling step.

    Attributes:
        recompute: the whole step runs again in backward, before its chains do what they do.
        recompute_between: what changes shape between the chains runs again instead of being stored inside.
        chains: of `CHAINS`, in that order.
    """

    recompute: bool
    recompute_between: bool
    chains: tuple[ChainSchedule, ChainSchedule, ChainSchedule, ChainSchedule]

    @classmethod
    def uniform(cls, recompute: bool, chain: ChainSchedule) -> StepSchedule:
        """The same for every chain; what is between them follows its recovery."""
        return cls(recompute, chain.recovery == "invert", (chain, chain, chain, chain))


STORED_STEP = StepSchedule.uniform(False, ChainSchedule("store"))
Schedule = tuple[StepSchedule, ...]
"""One a sampling step, in the order in which they run (t = T … 1)."""


def keep_for(name: str, keep: Collection[str] | None) -> frozenset[str]:
    """What schedule `name` keeps, checked; the default is {"steps"} for "two_level" and nothing for the others."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: {name!r} is unknown, expected one of {SCHEDULES}")
    if keep is None:
        return frozenset({"steps"}) & KEEPABLE[name]
    chosen = frozenset(keep)
    if not chosen <= KEEPABLE[name]:
        possible = f"a subset of {sorted(KEEPABLE[name])}" if KEEPABLE[name] else "nothing"
        raise ValueError(f"keep: schedule {name!r} cannot keep {sorted(chosen - KEEPABLE[name])}, expected {possible}")
    return chosen


def schedule_for(name: str, keep: Collection[str] | None, steps: int) -> Schedule:
    """The schedule called `name`.

    Args:
        name: "store" is plain autograd. "flat" inverts the layers inside every step, once. "two_level" runs all steps but
            the last again (backward begins with that one), and inverts the layers inside.
        keep: "attention": its outputs are stored. "steps" ("two_level" only, the default): the two one-channel images before
            each step are stored; without it they are recovered by inversion, as published, for which every step runs again.
        steps: T.

    Raises:
        ValueError: an unknown name, or something that it cannot keep.
    """
    chosen = keep_for(name, keep)
    if name == "store":
        return (STORED_STEP,) * steps
    chain = ChainSchedule("invert", "attention" in chosen, FEED_FORWARD_ROWS[name])
    last_too = name == "two_level" and "steps" not in chosen
    return tuple(
        StepSchedule.uniform(name == "two_level" and (last_too or step < steps - 1), chain) for step in range(steps)
    )
