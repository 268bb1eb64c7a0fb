"""What may be asked for: one implementation for every op, or one for each, as a benchmark run writes it into a file."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False)  # compared by identity, as every call of an op looks it up; `make` gives equal ones once
class OpByOp:
    """An explicit choice for some ops; the others are left to the automatic one.

    Attributes:
        names: implementation by op.
        label: how reports call it.
    """

    names: Mapping[str, str]
    label: str

    @classmethod
    def make(cls, names: Mapping[str, str], label: str = "op by op") -> OpByOp:
        return cls._make(tuple(sorted(names.items())), label)

    @classmethod
    @functools.cache
    def _make(cls, names: tuple[tuple[str, str], ...], label: str) -> OpByOp:
        return cls(dict(names), label)

    def __str__(self) -> str:
        return self.label


Choice = str | OpByOp | None
"""An implementation for every op, one for each, or the automatic choice."""


def read_choice(path: str | os.PathLike[str]) -> OpByOp:
    """The choice that a JSON file holds: {"ops": {op: implementation}, "device": what it was measured on, …}.

    Raises:
        RuntimeError: there is no such file, or it holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not JSON"
        raise RuntimeError(f"{path}: {why}; expected a file that python -m benchmarks has written") from None
    names = data.get("ops") if isinstance(data, dict) else None
    if not (isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())):
        raise RuntimeError(f'{path}: expected {{"ops": {{op: implementation}}}}, as python -m benchmarks writes it')
    device = f", measured on {data['device']}" if data.get("device") else ""
    return OpByOp.make(names, f"{Path(path).name}{device}")
