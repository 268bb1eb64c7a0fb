"""The benchmark suite: `python -m benchmarks --device cpu|cuda [--quick] [--only CASE …] --out DIR`.

Writes one JSON a case with every sample, a Markdown file and PNGs a case, and `report.html`. Every case runs in a process of
its own, under a time limit: one that fails or hangs is said to have, and the others go on. All of them have --minutes; what
does not fit is said to be left out. On a GPU the native extension is built first, where there is an nvcc. Other commands:

    python -m benchmarks list               the cases and their questions
    python -m benchmarks compare A B        what moved between two runs; exit code 1 on a regression
    python -m benchmarks report DIR         draw tables, plots and the page again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks import compare, fastest, report
from benchmarks.case import Case, Context, Result, load_cases, read_run
from benchmarks.machine import ROOT

MINUTES = {("cpu", True): 6.0, ("cpu", False): 60.0, ("cuda", True): 9.0}
"""(device, quick) → how long a run may take, all told."""
DRAWING = 10
"""Seconds of these that are kept for tables, plots and the page."""
SETTINGS = ("IDM_", "OMP_", "MKL_", "MALLOC_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_VISIBLE")
"""How the names of environment variables begin that a result depends on; JSON holds them, sizes stand in its names."""
BUILDING = 240
"""Seconds after which the build is given up."""
GRACE = 5
"""Seconds that a case has to end its processes when its time is over."""
TOO_SHORT = 10
"""A case with less than this many seconds left isn't started."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 when a case did not run at all (or, for compare, on a regression)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and not arguments[0].startswith("-") else "run"
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    if command == "compare":
        parser.add_argument("command")
        parser.add_argument("before", type=Path, help="folder of the earlier run")
        parser.add_argument("after", type=Path, help="folder of the later run")
        options = parser.parse_args(arguments)
        return compare.main(options.before, options.after)
    if command == "report":
        parser.add_argument("command")
        parser.add_argument("folder", type=Path, help="folder of a run")
        return _draw(parser.parse_args(arguments).folder)
    if command == "list":
        for case in load_cases().values():
            print(f"{case.name:18} {case.question} ({', '.join(case.devices)})")
        return 0
    cases = load_cases()
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples; on a CPU without scaling and quality")
    parser.add_argument("--only", nargs="+", choices=list(cases), metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark_output"), help="folder (default: %(default)s)")
    limits = ", ".join(f"{minutes:g} {'quickly ' * quick}on {device}" for (device, quick), minutes in MINUTES.items())
    parser.add_argument("--minutes", type=float, metavar="M", help=f"for all cases together (default: {limits})")
    parser.add_argument("--one", choices=list(cases), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device or _device()
    if device == "cuda" and _device() != "cuda":
        parser.error("--device cuda: PyTorch sees no GPU here; --device cpu counts what a GPU would do, and times the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        # On a CPU what runs unasked is what was measured, and is what the cases are about.
        known = options.out / fastest.FILE
        given = known if device == "cuda" and known.exists() else None
        context = Context(device, options.quick, options.seconds or float("inf"), given)
        return _run_here(cases[options.one], context, options.out)
    usual = [case.name for case in cases.values() if device in case.quick or not options.quick]
    chosen = [case for case in cases.values() if device in case.devices and case.name in (options.only or usual)]
    minutes = options.minutes or MINUTES.get((device, options.quick), float("inf"))
    end = time.monotonic() + 60 * minutes - DRAWING
    if device == "cuda":
        print(build_extension(), flush=True)
    failed = []
    if "kernels" in (case.name for case in chosen):  # which finds it anew
        (options.out / fastest.FILE).unlink(missing_ok=True)
    for case in chosen:
        left = end - time.monotonic()
        context = Context(device, options.quick, min(left, case.seconds[0 if options.quick else 1]))
        if left < TOO_SHORT:
            reason = f"left out: the {minutes:g} minutes of this run were over"
            print(f"{case.name}: {reason}", flush=True)
            _write(case, context, Result(failures=[reason]), 0.0, options.out / f"{case.name}.json")
        if left < TOO_SHORT or not _run_in_process(case, context, options.out):
            failed.append(case.name)
    _draw(options.out)
    print(f"{options.out / 'report.html'}: {len(chosen) - len(failed)} of {len(chosen)} cases")
    return 1 if failed else 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build_extension() -> str:
    """Build C++ and CUDA kernels into this checkout, for the GPU that is here; what came of it, in a line.

    Repeats only what changed since the last build. A failure is said, and the cases run with what there is.
    """
    import torch

    named = any(os.environ.get(name) for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"))
    if not (named or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        return "native extension: not built, there is no nvcc here"
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {"TORCH_CUDA_ARCH_LIST": architecture, "IDM_FAST_BUILD": "cuda"} | os.environ
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    started = time.perf_counter()
    # A session of its own, so that the compilers end with it.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=BUILDING)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"native extension: FAILED, not built in {BUILDING} s"
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "without a word")
    verdict = f"FAILED ({last.strip()})" if process.returncode else "built"
    return f"native extension: {verdict} for {environment['TORCH_CUDA_ARCH_LIST']} in {time.perf_counter() - started:.0f} s"


def _run_in_process(case: Case, context: Context, out: Path) -> bool:
    """Whether the case left a result."""
    print(f"{case.name}: {case.question}", flush=True)
    target = out / f"{case.name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--device", context.device, "--out", str(out), "--one", case.name]
    command += ["--seconds", f"{context.seconds:.0f}", *(["--quick"] if context.quick else [])]
    started = time.perf_counter()
    # A session of its own, so that the processes that a case starts end with it.
    process = subprocess.Popen(command, env=case.environment | os.environ, start_new_session=True)
    try:
        code = process.wait(context.seconds)
        reason = None if code == 0 else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        reason = f"stopped after {context.seconds:.0f} s"
    finally:
        if process.poll() is None:
            process.terminate()  # a case with processes in sessions of their own ends them first
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - started
    if not target.exists():
        _write(case, context, Result(failures=[str(reason)]), seconds, target)
    print(f"  {'FAILED: ' + reason if reason else 'done'} ({seconds:.0f} s)", flush=True)
    return reason is None


def _run_here(case: Case, context: Context, out: Path) -> int:
    started = time.perf_counter()
    code, target = 0, out / f"{case.name}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # In time for this process to be stopped after it, wherever it is by then.
    saving = threading.Timer(max(context.seconds - GRACE, 0), _write_so_far, (case, context, target))
    saving.daemon = True
    if context.seconds < float("inf"):
        saving.start()
    try:
        result = case.run(context)
    except Exception as error:
        traceback.print_exc()
        code, result = 1, context.begun[-1] if context.begun else Result()
        result.failures.append(f"{type(error).__name__}: {error}")
    saving.cancel()
    if saving.is_alive():  # it may be writing: the last word is ours
        saving.join()
    for failure in result.failures:
        print(f"  did not work: {failure}", flush=True)
    _write(case, context, result, time.perf_counter() - started, target)
    return code


def _write_so_far(case: Case, context: Context, target: Path) -> None:
    """What the case has found when its time is nearly over; replaced if it still ends."""
    for result in context.begun[-1:]:
        reason = f"stopped after {context.seconds:.0f} s: what had been measured by then stands, the rest is missing"
        so_far = replace(result, failures=[*result.failures, reason])
        _write(case, context, so_far, context.seconds, target)


def _write(case: Case, context: Context, result: Result, seconds: float, target: Path) -> None:
    from benchmarks.machine import describe

    data = {
        "case": case.name,
        "question": case.question,
        "quick": context.quick,
        "seconds": round(seconds, 1),
        "settings": {
            "limit_s": context.seconds if context.seconds < float("inf") else None,
            # Of paths the last part: where it lies is nobody's business.
            "environment": {n: Path(value).name for n, value in sorted(os.environ.items()) if n.startswith(SETTINGS)},
        },
        "machine": describe(context.device),
        "result": result.as_json(),
    }
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(target)
    if result.fastest:
        fastest.write(target.parent, result.fastest, data["machine"])


def _draw(folder: Path) -> int:
    results = read_run(folder)
    if not results:
        print(f"{folder}: holds no results (*.json)", file=sys.stderr)
        return 1
    for data in results:
        report.write_case(folder, data)
    report.write_page(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
