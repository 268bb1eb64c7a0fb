"""What a benchmark case is: a question, a function that answers it, and what the answer is made of.

A case module in `benchmarks/cases` holds one function with `@case(...)`. It gets a `Context` and returns a `Result`: samples of
everything measured, and the tables and plots that a reader should see. Results are plain data, so that JSON holds all of it
and a report can be drawn again from the files alone.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Cell = str | int | float

COUNTED = ("bytes", "FLOP", "launches")
"""Units of what was counted, in files that do not say `exact` yet."""


class WrongResult(Exception):
    """What was to be timed does not compute what it should; its time must not be shown."""


class NotHere(Exception):
    """This machine lacks what the case needs; the message says what."""


@dataclass(frozen=True)
class Measurement:
    """One figure with every sample of it.

    Attributes:
        name: unique within its case, the same on every machine.
        unit: "s", "bytes", "FLOP", "launches", "dB", "1", …
        samples: in the order in which they were taken.
        better: "lower", "higher", or "" where neither is.
        exact: counted, so the same in every run and on every machine: `compare` takes any difference for a change.
    """

    name: str
    unit: str
    samples: list[float]
    better: str = "lower"
    exact: bool = False

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; of fewer than two samples, the sample itself."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = quantiles(self.samples, n=4, method="inclusive")
        return first, third

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        counted = len(data["samples"]) == 1 and data["unit"] in COUNTED
        return cls(data["name"], data["unit"], data["samples"], data["better"], data.get("exact", counted))


@dataclass(frozen=True)
class Table:
    """Rows under columns; numbers are shown with three digits, text as it is."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """Lines through points, or bars. The title is the claim, the axes carry units, `baseline` is the line to compare with."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[Cell, float]]]
    baseline: str = ""
    log_x: bool = False
    log_y: bool = False
    bars: bool = False


def in_a_line(error: Exception) -> str:
    """Its type, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


@dataclass
class Result:
    """The answer of a case."""

    measurements: list[Measurement] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Parts that did not work, each with its reason; the rest of the result stands."""
    fastest: dict[str, str] = field(default_factory=dict)
    """Implementation by op, where the case has compared them."""

    def count(self, name: str, unit: str, value: float, better: str = "lower", exact: bool = True) -> float:
        """Record a figure that is the same in every run; with `exact=False` one that was measured once."""
        self.measurements.append(Measurement(name, unit, [value], better, exact))
        return value

    def samples(self, name: str, unit: str, samples: Sequence[float], better: str = "lower") -> Measurement:
        """Record what was measured several times."""
        self.measurements.append(Measurement(name, unit, list(samples), better))
        return self.measurements[-1]

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """`function()`, or None with the failure written down: one part must not take the others with it."""
        try:
            return function()
        except Exception as error:
            self.failed(what, error)
            return None

    def failed(self, what: str, error: Exception) -> None:
        """Write a failure down."""
        self.failures.append(f"{what}: {in_a_line(error)}")

    def failed_at(self, where: str) -> Callable[[str, Exception], None]:
        """What writes down that someone failed there."""
        return lambda who, error: self.failed(f"{where}, {who}", error)

    def as_json(self) -> dict[str, Any]:
        data = asdict(self)
        for entry, measurement in zip(data["measurements"], self.measurements, strict=True):
            entry["median"], (entry["q1"], entry["q3"]) = measurement.median, measurement.quartiles
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        plots = []
        for plot in data["plots"]:
            lines = {name: [(x, y) for x, y in points] for name, points in plot["lines"].items()}
            plots.append(Plot(**(plot | {"lines": lines})))
        return cls(
            [Measurement.from_json(entry) for entry in data["measurements"]],
            [Table(**table) for table in data["tables"]],
            plots,
            data["notes"],
            data["failures"],
            data.get("fastest", {}),
        )


@dataclass(frozen=True)
class Context:
    """How a case is run.

    Attributes:
        device: "cpu" or "cuda". quick: few sizes and samples. seconds: after which it ends.
        fastest: a file with the implementations that were fastest here by an earlier case.
    """

    device: str
    quick: bool
    seconds: float = float("inf")
    fastest: Path | None = None
    begun: list[Result] = field(default_factory=list, compare=False)

    def new_result(self, **parts: Any) -> Result:
        """A `Result` that is kept as far as it has come when the case's time is over."""
        self.begun.append(Result(**parts))
        return self.begun[-1]

    def check(self, what: str, error: float, bound: float) -> None:
        """WrongResult unless `error` ≤ `bound`; NaN fails as well."""
        if not error <= bound:
            raise WrongResult(f"{what} is off by {error:.3g}, allowed are {bound:.3g}: not timed")


@dataclass(frozen=True)
class Case:
    """A registered case.

    Attributes:
        name: of its file. question: what it answers, in a sentence.
        devices: on which it runs.
        quick: on which it is part of a quick run, unless asked for by name.
        seconds: time limit of a quick and of a full run; what takes longer is stopped and said to have been.
        environment: variables of its process; one that is set already stays as it is.
    """

    name: str
    question: str
    run: Callable[[Context], Result]
    devices: tuple[str, ...]
    seconds: tuple[int, int]
    quick: tuple[str, ...] = ("cpu", "cuda")
    environment: dict[str, str] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(
    question: str,
    devices: Iterable[str] = ("cpu", "cuda"),
    seconds: tuple[int, int] = (60, 600),
    quick: Iterable[str] = ("cpu", "cuda"),
    environment: dict[str, str] | None = None,
) -> Callable[..., Any]:
    """Register the decorated function as the case of its module."""

    def register(function: Callable[[Context], Result]) -> Callable[[Context], Result]:
        name = function.__module__.rpartition(".")[2]
        CASES[name] = Case(name, question, function, tuple(devices), seconds, tuple(quick), environment or {})
        return function

    return register


def read_run(folder: Path) -> list[dict[str, Any]]:
    """What the cases of a run have written into `folder`, by file name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [data for data in found if "case" in data]


def load_cases() -> dict[str, Case]:
    """Every case, by name, in the order of `ORDER`."""
    from benchmarks import cases

    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"benchmarks.cases.{module.name}")
    return {name: CASES[name] for name in sorted(CASES, key=lambda name: (cases.ORDER.index(name), name))}
