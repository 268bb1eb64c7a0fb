"""What moved between two runs? `python -m benchmarks compare A B` exits with 1 when something of B is worse than in A.

A count (one sample) is worse as soon as it is worse at all. A time is worse when B's better quartile lies beyond A's worse
quartile, so outside of both runs' spread, and the medians are more than 3 % apart. Times of different devices aren't compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import Measurement, Result

LEAST_CHANGE = 0.03


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
        return f"{self.verdict:6} {self.case}: {self.name}: {moved}"


def judge(before: Measurement, after: Measurement) -> str:
    """"worse", "better" or "same", `after` against `before`."""
    if not before.better:
        return "same"
    sign = 1 if before.better == "lower" else -1
    if len(before.samples) == len(after.samples) == 1:
        difference = sign * (after.median - before.median)
        return "worse" if difference > 0 else "better" if difference < 0 else "same"
    if abs(after.median - before.median) <= LEAST_CHANGE * abs(before.median):
        return "same"
    low_before, high_before = sorted(sign * q for q in before.quartiles)
    low_after, high_after = sorted(sign * q for q in after.quartiles)
    return "worse" if low_after > high_before else "better" if high_after < low_before else "same"


def compare(before: Path, after: Path) -> tuple[list[Change], list[str]]:
    """Changes of every figure that both folders have, and remarks about what could not be compared."""
    old, new = _read(before), _read(after)
    changes, remarks = [], []
    for name in [*old, *(set(new) - set(old))]:
        if name not in old or name not in new:
            remarks.append(f"{name}: only in {before if name in old else after}")
            continue
        (machine, first), (other, second) = old[name], new[name]
        same_device = machine["device_name"] == other["device_name"]
        if not same_device:
            remarks.append(f"{name}: {machine['device_name']} and {other['device_name']}: only counts are compared")
        theirs = {m.name: m for m in second.measurements}
        for mine in first.measurements:
            if mine.name not in theirs:
                remarks.append(f"{name}: {mine.name}: missing in {after}")
            elif same_device or len(mine.samples) == 1:
                their = theirs[mine.name]
                changes.append(Change(name, mine.name, mine.unit, mine.median, their.median, judge(mine, their)))
    return changes, remarks


def _read(folder: Path) -> dict[str, tuple[dict, Result]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no results (*.json); run python -m benchmarks --out {folder}")
    found = {}
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        found[data["case"]] = (data["machine"], Result.from_json(data["result"]))
    return found


def main(before: Path, after: Path) -> int:
    """Print what moved; the exit code."""
    changes, remarks = compare(before, after)
    for remark in remarks:
        print(f"note   {remark}")
    for verdict in ("better", "worse"):
        for change in changes:
            if change.verdict == verdict:
                print(change)
    worse = sum(change.verdict == "worse" for change in changes)
    print(f"{len(changes)} figures compared: {worse} worse, {sum(c.verdict == 'better' for c in changes)} better")
    return 1 if worse else 0
