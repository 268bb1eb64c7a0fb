"""The fastest implementation of each op on one machine, by the kernels case, as a file that `idm_fast.use` takes.

What a machine runs unasked was decided by benchmarks on another one, and on a GPU by none yet. This is the choice for the
machine that a run was made on: `IDM_FAST_IMPL=DIR/fastest.json`, `--impl DIR/fastest.json` or
`idm_fast.use("DIR/fastest.json")`. Later cases of a run on a GPU are timed with it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "fastest.json"
TOGETHER = (
    ("couple", "decouple", "uncouple", "uncouple_"),
    ("inject_couple", "inject_uncouple", "inject_uncouple_"),
    ("fixed_couple", "fixed_decouple", "fixed_uncouple"),
    ("pack_bits", "unpack_bits"),
)
"""Ops that one implementation runs, or else what one of them rounds is not what the other takes back."""

Times = Mapping[tuple[str, str], Mapping[str, float]]
"""(op, shape) → implementation → seconds."""


def fastest(times: Times) -> dict[str, str]:
    """The implementation of each op that takes the least time over all shapes together.

    One that is missing at a shape, where it was wrong or failed, is not taken. Ops of `TOGETHER` are left out while one is
    missing.
    """
    ops = dict.fromkeys(op for op, _ in times)
    tied = {op: group for group in TOGETHER for op in group}
    chosen: dict[str, str] = {}
    for group in dict.fromkeys(tied.get(op, (op,)) for op in ops):
        if not all(op in ops for op in group):
            continue
        rows = [of for (op, _), of in times.items() if op in group]
        complete = [name for name in rows[0] if all(name in row for row in rows)]
        if complete:
            best = min(complete, key=lambda name: sum(row[name] for row in rows))
            chosen |= dict.fromkeys(group, best)
    return chosen


def speedups(times: Times, chosen: Mapping[str, str]) -> Iterable[tuple[str, str, float]]:
    """(op, implementation, times as fast as the reference), over all shapes together."""
    for op, name in chosen.items():
        rows = [of for (other, _), of in times.items() if other == op and "reference" in of]
        if rows:
            yield op, name, sum(row["reference"] for row in rows) / sum(row[name] for row in rows)


def write(folder: Path, chosen: Mapping[str, str], machine: Mapping[str, Any]) -> None:
    """`folder`/fastest.json, with what it was measured on."""
    data = {"device": machine["device_name"], "commit": machine["commit"], "torch": machine["torch"], "ops": dict(chosen)}
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)
