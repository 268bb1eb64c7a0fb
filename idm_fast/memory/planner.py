"""The schedule of a training step with the fewest FLOP that fits a memory budget, and the largest step that fits at all.

A sampling step costs the same wherever it stands in the network, so each kind of step is counted once, alone (T = 1, under fake
tensors, exact), and T steps are put together by arithmetic (`compose`). What is chosen is then counted as a whole: that figure
is the one reported, and if it does not fit, the next choice is taken. "Fastest" means fewest FLOP, then fewest launches.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch

from idm_fast.memory.count import GIB, StepCount, count_training_step
from idm_fast.memory.schedule import FEED_FORWARD_ROWS, STORED_STEP, ChainSchedule, Schedule, StepSchedule
from idm_fast.outputs import InputError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_LEAN = ChainSchedule(feed_forward_rows=FEED_FORWARD_ROWS["two_level"])
_LEAN_KEPT = replace(_LEAN, keep_attention=True)
_KEPT, _STORED = ChainSchedule(keep_attention=True), ChainSchedule("store")
LEANEST = "inverted, feed-forward in chunks"
KINDS: Mapping[str, StepSchedule] = {
    LEANEST: StepSchedule.uniform(False, _LEAN),
    "inverted, feed-forward in chunks, attention kept": StepSchedule.uniform(False, _LEAN_KEPT),
    "inverted, attention kept": StepSchedule.uniform(False, _KEPT),
    "inverted, attention and what is between kept": StepSchedule(False, False, (_KEPT, _KEPT, _KEPT, _KEPT)),
    "low resolution stored": StepSchedule(False, False, (_KEPT, _STORED, _STORED, _KEPT)),
    "all but the last chain stored": StepSchedule(False, False, (_STORED, _STORED, _STORED, _KEPT)),
    "stored": STORED_STEP,
}
"""Kinds of sampling steps that are not run again; each is also offered with the whole step run again in backward."""

AGAIN = "run again, then "


@dataclass(frozen=True)
class StepCost:
    """What one sampling step adds to a training step.

    Attributes:
        held_bytes: of the step alone, alive from its forward pass to its backward pass.
        peak_bytes: with it and nothing else under way, shared weight copies left out.
        flop, launches: forward and backward.
    """

    name: str
    schedule: StepSchedule
    held_bytes: int
    peak_bytes: int
    flop: int
    launches: int


@dataclass(frozen=True)
class Choice:
    """A schedule of all steps with its composed cost.

    `launches` is for comparing schedules: it lacks what happens between the steps (additions of gradients, mostly), the same
    number for all schedules of as many steps.
    """

    steps: tuple[StepCost, ...]
    peak_bytes: int
    flop: int
    launches: int

    @property
    def schedule(self) -> Schedule:
        return tuple(step.schedule for step in self.steps)

    def __str__(self) -> str:
        return " + ".join(f"{count}× ({name})" for name, count in Counter(step.name for step in self.steps).items())


@dataclass(frozen=True)
class Plan:
    """What the planner chose.

    Attributes:
        schedule: for `IDM.plan`.
        count: what the whole training step costs under it, counted exactly.
        choice: the chosen one of `candidates`, with its composed prediction.
        candidates: the Pareto front of peak memory and FLOP, leanest first.
        uniform: every kind of step used for all steps, for comparison.
    """

    schedule: Schedule
    count: StepCount
    choice: Choice
    candidates: tuple[Choice, ...]
    uniform: tuple[Choice, ...]


def parse_bytes(text: str | int) -> int:
    """ "12GiB", "500 MiB", "24GB" or a number of bytes → bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in UNITS or float(match[1]) <= 0:
        raise InputError(f"memory: {text!r} is no positive amount; write it as 12GiB or 500MiB")
    return int(float(match[1]) * UNITS[unit])


class Planner:
    """Plans training steps of one network.

    Args:
        make_model: steps → an IDM; called under fake tensors, so that full size costs no memory.
        batch, size: of the training step, in images and pixels (a side, or height and width).
        ratio: of the sensing.
        autocast: dtype, or None.
        on_count: called after each count, for a progress bar; `counts` says how many there will be at least.
        as_reference: the ops that run as plain PyTorch, operation by operation; the others are a launch each.
        threads: `resident_threads` of the GPU that it is for; 0 counts no scratch memory of PyTorch's.
    """

    counts = len(KINDS) + 2

    def __init__(
        self,
        make_model: Callable[[int], Any],
        batch: int,
        size: int | tuple[int, int],
        ratio: float = 0.1,
        autocast: torch.dtype | None = torch.bfloat16,
        on_count: Callable[[], object] = lambda: None,
        as_reference: Collection[str] = (),
        threads: int = 0,
    ) -> None:
        self._make_model, self._autocast, self._on_count = make_model, autocast, on_count
        self._as_reference, self._threads = tuple(as_reference), threads
        self._batch, self._size, self._ratio = batch, size, ratio
        self._costs: tuple[list[StepCost], int] | None = None

    def exactly(self, schedule: Schedule) -> StepCount:
        """The cost of a training step under `schedule`, counted as a whole."""

        def make() -> Any:
            model = self._make_model(len(schedule))
            model.plan = schedule
            return model

        count = count_training_step(
            make, self._batch, self._size, self._ratio, self._autocast, self._as_reference, threads=self._threads
        )
        self._on_count()
        return count

    def costs(self) -> tuple[list[StepCost], int]:
        """The kinds of steps, and the bytes of the half-precision weight copies that all steps share."""
        if self._costs is None:
            again = self.exactly((replace(KINDS[LEANEST], recompute=True),))
            counts = {name: self.exactly((kind,)) for name, kind in KINDS.items()}
            # What runs again holds a few images besides the copies, and costs one more forward pass, whatever it is inside.
            shared = again.held_bytes
            forward = again.flop - counts[LEANEST].flop, again.launches - counts[LEANEST].launches
            costs = []
            for name, kind in KINDS.items():
                count = counts[name]
                peak, held = count.peak_bytes - shared, count.held_bytes - shared
                costs.append(StepCost(name, kind, held, peak, count.flop, count.launches))
                flop, launches = count.flop + forward[0], count.launches + forward[1]
                costs.append(StepCost(AGAIN + name, replace(kind, recompute=True), 0, peak, flop, launches))
            self._costs = costs, shared
        return self._costs

    def candidates(self, steps: int) -> tuple[Choice, ...]:
        """The Pareto front of T-step schedules, leanest first."""
        costs, shared = self.costs()
        return _front(_combine(_undominated(costs), steps, shared))

    def uniform(self, steps: int) -> tuple[Choice, ...]:
        """Every kind of step used for all `steps`."""
        costs, shared = self.costs()
        return tuple(compose((cost,) * steps, shared) for cost in costs)

    def leanest(self, steps: int) -> Schedule:
        """What needs least memory, without counting anything: all steps but the last run again."""
        kind = KINDS[LEANEST]
        return (*[replace(kind, recompute=True)] * (steps - 1), kind)

    def plan(self, steps: int, budget: int) -> Plan:
        """The schedule with the fewest FLOP whose exact peak is at most `budget` bytes.

        Raises:
            InputError: none fits; it says the smallest budget that would do.
        """
        candidates = self.candidates(steps)
        for choice in reversed(candidates):
            # The composed peak of the leanest one may be a little too high, so that one is always counted.
            if choice.peak_bytes <= budget or choice is candidates[0]:
                count = self.exactly(choice.schedule)
                if count.peak_bytes <= budget:
                    return Plan(choice.schedule, count, choice, candidates, self.uniform(steps))
        raise InputError(_cannot(budget, count.peak_bytes))

    def largest(self, what: str, steps: int, budget: int) -> int:
        """The largest batch, image side (a multiple of 32) or T that fits, with the leanest schedule.

        Batch and side are counted exactly. T is extrapolated from 2 and 3: each further step adds the same few images.

        Args:
            what: "batch", "size" or "steps"; the planner's (or argument's) value of that one is ignored.

        Raises:
            InputError: not even the smallest fits.
        """
        if what == "steps":
            two, three = (self.exactly(self.leanest(T)).peak_bytes for T in (2, 3))
            if two <= budget:
                return 2 + (budget - two) // max(three - two, 1)
            one = self.exactly(self.leanest(1)).peak_bytes
            if one > budget:
                raise InputError(_cannot(budget, one))
            return 1
        unit, power = {"batch": (1, 1), "size": (32, 2)}[what]

        def need(n: int) -> int:
            change = {"batch": n} if what == "batch" else {"size": unit * n}
            return self._with(**change).exactly(self.leanest(steps)).peak_bytes

        return unit * _largest(need, power, budget)

    def _with(self, batch: int | None = None, size: int | None = None) -> Planner:
        of = partial(
            Planner,
            ratio=self._ratio,
            autocast=self._autocast,
            on_count=self._on_count,
            as_reference=self._as_reference,
        )
        return of(self._make_model, batch or self._batch, size or self._size)


def compose(steps: Sequence[StepCost], shared: int) -> Choice:
    """The cost of a training step that runs `steps` in this order forward, and backward in reverse.

    While a step is under way, what the steps before it hold is there. The weight copies of `shared` bytes are there always,
    and from the second step that goes backward on so are gradients of the same size.
    """
    held = peak = 0
    for position, step in enumerate(steps):
        gradients = 0 if position == len(steps) - 1 else shared
        peak = max(peak, held + step.peak_bytes + gradients)
        held += step.held_bytes
    return Choice(tuple(steps), shared + peak, sum(s.flop for s in steps), sum(s.launches for s in steps))


def options_of(model: Any) -> dict[str, Any]:
    """What builds a model like `model`, without its budget."""
    known = inspect.signature(type(model).__init__).parameters
    return {name: value for name, value in model.config.items() if name in known and name != "memory_budget"}


def _combine(kinds: Sequence[StepCost], steps: int, shared: int) -> Iterable[Choice]:
    """All choices of `steps` kinds (from T = 4 on, two kinds in any proportion and a third once), each in its best order.

    The peak is least when the steps with the largest peak − held run first (exchange two neighbours and see).
    """
    ordered = sorted(kinds, key=lambda kind: kind.held_bytes - kind.peak_bytes)
    numbers = range(len(ordered))
    chosen = {
        tuple(sorted([a] * i + [b] * (steps - 1 - i) + [c]))
        for a, b in combinations_with_replacement(numbers, 2)
        for i in range(steps)
        for c in numbers
    }
    return (compose([ordered[number] for number in choice], shared) for choice in sorted(chosen))


def _undominated(kinds: Sequence[StepCost]) -> list[StepCost]:
    """Without those that another one beats in everything; of equals the first."""
    kept: list[StepCost] = []
    for kind in sorted(kinds, key=lambda k: (k.flop, k.launches, k.peak_bytes, k.held_bytes)):
        if not any(k.peak_bytes <= kind.peak_bytes and k.held_bytes <= kind.held_bytes for k in kept):
            kept.append(kind)
    return kept


def _front(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.peak_bytes, c.flop, c.launches)):
        if not front or choice.flop < front[-1].flop:
            front.append(choice)
    return tuple(front)


def _largest(need: Callable[[int], int], power: int, budget: int) -> int:
    """The largest n ≥ 1 with need(n) ≤ budget, for a need that is nearly affine in n^power."""
    known = {n: need(n) for n in (1, 2)}
    if known[1] > budget:
        raise InputError(_cannot(budget, known[1]))
    while True:
        fit = max(n for n, bytes in known.items() if bytes <= budget)
        too_large = min((n for n, bytes in known.items() if bytes > budget), default=None)
        if too_large == fit + 1:
            return fit
        a, b = (fit, too_large) if too_large else sorted(known)[-2:]
        slope = max((known[b] - known[a]) / (b**power - a**power), 1)
        guess = int((a**power + (budget - known[a]) / slope) ** (1 / power) + 1e-9)
        guess = max(fit + 1, guess if too_large is None else min(guess, too_large - 1))
        known[guess] = need(guess)


def written(amount: int) -> str:
    """Bytes as a budget is written, rounded up, so that what it says is enough."""
    unit, name = (GIB, "GiB") if amount >= GIB else (2**20, "MiB")
    return f"{-(-amount * 1000 // unit) / 1000:.3f}{name}"


def _cannot(budget: int, smallest: int) -> str:
    return (
        f"memory budget: {written(budget)} is too little for this training step, which needs at least {written(smallest)} for "
        "activations; lower the batch or the image size, or use bf16 or fp16 autocast"
    )
