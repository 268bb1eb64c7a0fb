"""metrics.jsonl: one JSON object a line, one line an update, further lines for validations. Tensorboard on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from idm_fast.outputs import write_atomically


class MetricsLog:
    """Appends to a file whose lines past `step` (of a run that was killed after its last checkpoint) are cut off first.

    Every line has "step", the number of updates done. A line is with the operating system once `write` returns.

    Args:
        path: of the file; its folder must exist.
        step: where the run starts.
        tensorboard: folder for event files with the same numbers; None for none.
    """

    def __init__(self, path: Path, step: int, tensorboard: Path | None = None) -> None:
        kept = b"".join(line for line in _lines(path) if _step(line) <= step)
        write_atomically(path, lambda file: file.write(kept))
        self._file = open(path, "a", encoding="utf-8")
        self._board: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line. Values are numbers or mappings of them; what is not finite becomes null."""
        line = _without_infinity({"step": step} | dict(values))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, step)

    def flush_to_disk(self) -> None:
        """Call before a checkpoint: it must not outlive, in a power cut, the lines that lead up to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step(line: bytes) -> float:
    """Infinite for a line that was cut short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinity(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
