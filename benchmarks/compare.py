"""What moved between two runs? `python -m benchmarks compare A B` exits with 1 when B is worse than A, or lacks what A has.

A counted figure is worse as soon as it is worse at all. A measured one must be worse by more than chance, see `judge`, and is
compared between like runs alone: on the same device, with as many threads, both of them quick or both full. A figure of A that
is missing in B fails as well, unless B did not run that case, or is so unlike A that it measures something else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import Measurement, Result, read_run

ENOUGH = 8
"""Samples from which on quartiles say something."""
LEAST_CHANGE = 0.03
LEAST_CHANGE_OF_FEW = 0.05
LEAST_CHANGE_OF_ONE = 0.10
LEAST_CHANGE_OF_ONE_PEAK = 0.05
LEAST_DIFFERENCE = {"dB": 0.02, "1": 0.001}


@dataclass(frozen=True)
class Change:
    """A figure in both runs. `verdict`: "worse", "better" or "same"."""

    case: str
    name: str
    unit: str
    before: float
    after: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf") if self.after else 1.0

    def __str__(self) -> str:
        moved = f"{self.before:.4g} → {self.after:.4g} {self.unit} ({self.ratio:.3f}×)"
        return f"{self.verdict:7} {self.case}: {self.name}: {moved}"


@dataclass(frozen=True)
class Run:
    """A case of a run, with what its figures depend on beside the code."""

    device_name: str
    threads: int
    quick: bool
    result: Result

    def measures_as(self, other: Run) -> bool:
        """Whether both should have the same figures: sizes depend on the device, and on whether the run is quick."""
        return (self.device_name, self.quick) == (other.device_name, other.quick)

    def differences(self, other: Run) -> list[str]:
        """Why times of the two say nothing about the code; empty for like runs."""
        found = []
        if self.device_name != other.device_name:
            found.append(f"{self.device_name} and {other.device_name}")
        if self.quick != other.quick:
            found.append("a quick and a full run" if self.quick else "a full and a quick run")
        if self.threads != other.threads:
            found.append(f"threads: {self.threads} and {other.threads}")
        return found


def judge(before: Measurement, after: Measurement) -> str:
    """"worse", "better" or "same", `after` against `before`.

    Any difference of exact figures counts. Measured ones differ when their medians are more than 3 % apart, and the better
    quartile of one lies beyond the worse quartile of the other, so outside of both spreads.

    With fewer than 8 samples on a side that happens by chance: two against two are disjoint one time in six, three against
    three one in twenty, in each direction. So then the ranges must be disjoint, and the medians further apart than 5 % and than
    twice the wider range: of two against two normal samples that leaves 7 % by chance, of three against three less than 1 %.
    Of a single sample no spread is known; see `_least_of_one`.
    """
    if not before.better:
        return "same"
    if math.isnan(after.median):
        return "same" if math.isnan(before.median) else "worse"
    sign = 1 if before.better == "lower" else -1
    difference = sign * (after.median - before.median)
    if before.exact and after.exact:
        return "worse" if difference > 0 else "better" if difference < 0 else "same"
    fewest = min(len(before.samples), len(after.samples))
    if fewest >= ENOUGH:
        spreads = before.quartiles, after.quartiles
        least = LEAST_CHANGE * abs(before.median)
    else:
        spreads = (min(before.samples), max(before.samples)), (min(after.samples), max(after.samples))
        least = _least_of_one(before) if fewest == 1 else LEAST_CHANGE_OF_FEW * abs(before.median)
        least = max(least, *(2 * (high - low) for low, high in spreads))
    if abs(difference) <= least:
        return "same"
    (low_before, high_before), (low_after, high_after) = (sorted(sign * value for value in spread) for spread in spreads)
    return "worse" if low_after > high_before else "better" if high_after < low_before else "same"


def _least_of_one(before: Measurement) -> float:
    """The difference up to which two values measured once are the same.

    Times: 10 %; what is timed once, a call of a large network, differs by up to 6 % from one repetition to the next. Peaks: 5 %
    for what libraries allocate on the side. PSNR: 0.02 dB, which the quality case lets bfloat16 cost. That is 0.5 % of the
    squared error, and 0.5 % of 1 − SSIM is 0.001 at an SSIM of 0.8.
    """
    relative = LEAST_CHANGE_OF_ONE_PEAK if before.unit == "bytes" else LEAST_CHANGE_OF_ONE
    return LEAST_DIFFERENCE.get(before.unit, relative * abs(before.median))


def compare(before: Path, after: Path) -> tuple[list[Change], list[str], list[str]]:
    """Changes of every figure that can be compared, the figures that B should have and has not, and remarks."""
    old, new = _read(before), _read(after)
    changes, missing, remarks = [], [], []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            remarks.append(f"{name}: only in {before if name in old else after}")
            continue
        first, second = old[name], new[name]
        differences = first.differences(second)
        if differences:
            remarks.append(f"{name}: {', '.join(differences)}: only counts are compared")
        remarks += [f"{name}: did not work in {after}: {failure}" for failure in second.result.failures]
        theirs = {m.name: m for m in second.result.measurements}
        absent = [mine.name for mine in first.result.measurements if mine.name not in theirs]
        if first.measures_as(second) or second.result.failures:
            missing += [f"{name}: {figure}" for figure in absent]
        elif absent:
            remarks.append(f"{name}: {len(absent)} figures are in {before} alone")
        for mine in first.result.measurements:
            their = theirs.get(mine.name)
            if their is not None and (not differences or (mine.exact and their.exact)):
                changes.append(Change(name, mine.name, mine.unit, mine.median, their.median, judge(mine, their)))
    return changes, missing, remarks


def _read(folder: Path) -> dict[str, Run]:
    results = read_run(folder)
    if not results:
        raise FileNotFoundError(f"{folder}: holds no results (*.json); run python -m benchmarks --out {folder}")
    found = {}
    for data in results:
        machine = data["machine"]
        found[data["case"]] = Run(machine["device_name"], machine["threads"], data["quick"], Result.from_json(data["result"]))
    return found


def main(before: Path, after: Path) -> int:
    """Print what moved; the exit code."""
    changes, missing, remarks = compare(before, after)
    for remark in remarks:
        print(f"note    {remark}")
    for figure in missing:
        print(f"missing {figure}")
    for verdict in ("better", "worse"):
        for change in changes:
            if change.verdict == verdict:
                print(change)
    worse, better = (sum(change.verdict == verdict for change in changes) for verdict in ("worse", "better"))
    print(f"{len(changes)} figures compared: {worse} worse, {better} better; {len(missing)} missing in {after}")
    return 1 if worse or missing else 0
