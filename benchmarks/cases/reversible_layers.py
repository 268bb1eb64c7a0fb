"""Reversible layers: ours, torch.utils.checkpoint and the reversible libraries on one network, and what each does in training.

The libraries are installed by pip into a folder of their own, without their dependencies, which would replace torch. Without
a network the table has ours and checkpoint alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.case import Cell, Context, NotHere, Plot, Result, Table, case
from benchmarks.contenders import ours_by_environment
from benchmarks.peers import BEHAVIOURS, CHECKPOINT, OURS, PLAIN, WHO

VERSIONS = {"memcnn": "1.5.2", "revlib": "1.7.2", "RevTorch": "0.2.4", "momentumnet": "0.10"}
INSTALL_SECONDS, CHILD_SECONDS = 60, 240
MIB = 2**20


@case("What do reversible layers save and cost, and which of them train correctly?", seconds=(300, 900))
def run(context: Context) -> Result:
    result = context.new_result()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result.attempt("the libraries", lambda: install(folder))
        by = ours_by_environment(context)
        measured = result.attempt("measuring", lambda: child(folder, "measure", context.device, mode(context), **by))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            running = {who: pool.submit(child, folder, "behaviours", who) for who in here(folder)}
            answers = {who: result.attempt(who, future.result) for who, future in running.items()}
    if measured:
        add_figures(result, measured, counted=context.device == "cpu")
    if any(answers.values()):
        result.tables.append(behaviour_table({who: answer for who, answer in answers.items() if answer}))
        for who, answer in answers.items():
            if answer:
                result.count(f"behaviours as in plain autograd: {who}", "1", sum(a == "yes" for a in answer.values()), "higher")
    return result


def mode(context: Context) -> str:
    return "quick" if context.quick else "full"


def here(folder: Path) -> list[str]:
    """Ours, torch's, and what was installed."""
    return [who for who in WHO if who not in VERSIONS or (folder / who.lower()).is_dir()]


def install(folder: Path) -> None:
    """Put the libraries into the folder; NotHere when pip cannot."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "0", "--no-deps"]
    command += ["--timeout", "15", "--target", str(folder), *(f"{package}=={v}" for package, v in VERSIONS.items())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotHere(f"left out: installing {', '.join(VERSIONS)} took more than {INSTALL_SECONDS} s") from None
    if done.returncode:
        raise NotHere(f"left out: pip could not install {', '.join(VERSIONS)} (no network?)")


def child(folder: Path, *arguments: str, **environment: str) -> Any:
    """What `python -m benchmarks.peers` prints, with the folder's packages; RuntimeError with its last words."""
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    if arguments[0] == "behaviours":
        environment["OMP_NUM_THREADS"] = "1"  # several run at a time: threads of one would wait for cores that another holds
        environment["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, each in a fork, where the compiler may not ask for a GPU
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {CHILD_SECONDS} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def add_figures(result: Result, measured: dict[str, dict[str, Any]], counted: bool = False) -> None:
    """Memory (`counted`, or measured), time and gradient error of each library on one network."""
    settings = measured.pop("settings")["text"]
    for who, found in measured.items():
        if "failure" in found and not found["failure"].startswith("ModuleNotFoundError"):  # that is said by `install`
            result.failures.append(f"{who}: {found['failure']}")
    good = {who: found for who, found in measured.items() if "seconds" in found}
    rows: list[list[Cell]] = []
    for who, found in good.items():
        seconds = result.samples(f"step {who}", "s", found["seconds"]).median
        result.count(f"peak {who}", "bytes", found["peak"], exact=counted)
        rows.append([named(who), found["peak"] / MIB, 1e3 * seconds, f"{found['error']:.1e}"])
    table = Table(
        f"One training step: {settings}",
        ["library", "peak activations (MiB)", "time (ms)", "gradient error"],
        rows,
        "Peak: all that a step allocates, less the parameters' gradients. Gradient error: |g − g64| / |g64|, all parameters,"
        " g64 in float64 by plain autograd. momentumnet computes another function on half of the channels.",
    )
    result.tables.append(table)
    if PLAIN in good and OURS in good:
        saved = 1 - good[OURS]["peak"] / good[PLAIN]["peak"]
        peaks: list[tuple[Cell, float]] = [(named(who), found["peak"] / MIB) for who, found in good.items()]
        title = f"Reversible layers of idm-fast need {100 * saved:.0f} % less memory than plain autograd"
        label = "peak activations of a training step (MiB)"
        result.plots.append(Plot(title, "", label, {"peak": peaks}, named(PLAIN), bars=True))
        times = {who: result_median(result, f"step {who}") for who in good}
        slower = times[OURS] / times[PLAIN]
        title = f"A training step of idm-fast takes {slower:.2f} times as long as plain autograd"
        points: list[tuple[Cell, float]] = [(named(who), 1e3 * t) for who, t in times.items()]
        result.plots.append(Plot(title, "", "time of a training step (ms)", {"time": points}, named(PLAIN), bars=True))


def result_median(result: Result, name: str) -> float:
    return next(m.median for m in result.measurements if m.name == name)


def named(who: str) -> str:
    return f"{who} {VERSIONS[who]}" if who in VERSIONS else who


def behaviour_table(answers: dict[str, dict[str, str]]) -> Table:
    rows: list[list[Cell]] = [[name, *(brief(answer[name]) for answer in answers.values())] for name in BEHAVIOURS]
    return Table(
        "As plain autograd does it? Each behaviour run with each library",
        ["behaviour", *map(named, answers)],
        rows,
        "yes: the gradients of plain autograd in float32. Dropout: 0.5 in every body. DDP: two processes with an image each, "
        "one body shared by four layers. "
        f"{CHECKPOINT}: use_reentrant=False, a pair of bodies at a time.",
    )


def brief(answer: str) -> str:
    return answer if len(answer) <= 90 else answer[:87] + "…"
