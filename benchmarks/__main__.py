"""The benchmark suite: `python -m benchmarks --device cpu|cuda [--quick] [--only CASE …] --out DIR`.

Writes one JSON a case with every sample, a Markdown file and PNGs a case, and `report.html`. Every case runs in a process of
its own, under a time limit: one that fails or hangs is said to have, and the others go on. Other commands:

    python -m benchmarks list               the cases and their questions
    python -m benchmarks compare A B        what moved between two runs; exit code 1 on a regression
    python -m benchmarks report DIR         draw tables, plots and the page again
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from benchmarks import compare, report
from benchmarks.case import Case, Context, Result, load_cases


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
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples: minutes instead of an hour")
    parser.add_argument("--only", nargs="+", choices=list(cases), metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark_output"), help="folder (default: %(default)s)")
    parser.add_argument("--one", choices=list(cases), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device or _device()
    if device == "cuda" and _device() != "cuda":
        parser.error("--device cuda: PyTorch sees no GPU here; --device cpu counts what a GPU would do, and times the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        return _run_here(cases[options.one], Context(device, options.quick), options.out)
    chosen = [case for case in cases.values() if device in case.devices and case.name in (options.only or cases)]
    failed = [case.name for case in chosen if not _run_in_process(case, Context(device, options.quick), options.out)]
    _draw(options.out)
    print(f"{options.out / 'report.html'}: {len(chosen) - len(failed)} of {len(chosen)} cases")
    return 1 if failed else 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _run_in_process(case: Case, context: Context, out: Path) -> bool:
    """Whether the case left a result."""
    print(f"{case.name}: {case.question}", flush=True)
    target = out / f"{case.name}.json"
    target.unlink(missing_ok=True)
    limit = case.seconds[0 if context.quick else 1]
    command = [sys.executable, "-m", "benchmarks", "--device", context.device, "--out", str(out), "--one", case.name]
    started = time.perf_counter()
    # A session of its own, so that the processes that a case starts end with it.
    process = subprocess.Popen([*command, *(["--quick"] if context.quick else [])], start_new_session=True)
    try:
        code = process.wait(limit)
        reason = None if code == 0 else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        reason = f"stopped after {limit} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - started
    if not target.exists():
        _write(case, context, Result(failures=[str(reason)]), seconds, target)
    print(f"  {'FAILED: ' + reason if reason else 'done'} ({seconds:.0f} s)", flush=True)
    return reason is None


def _run_here(case: Case, context: Context, out: Path) -> int:
    started = time.perf_counter()
    code = 0
    try:
        result = case.run(context)
    except Exception as error:
        traceback.print_exc()
        code, result = 1, Result(failures=[f"{type(error).__name__}: {error}"])
    for failure in result.failures:
        print(f"  did not work: {failure}", flush=True)
    _write(case, context, result, time.perf_counter() - started, out / f"{case.name}.json")
    return code


def _write(case: Case, context: Context, result: Result, seconds: float, target: Path) -> None:
    from benchmarks.machine import describe

    data = {
        "case": case.name,
        "question": case.question,
        "quick": context.quick,
        "seconds": round(seconds, 1),
        "machine": describe(context.device),
        "result": result.as_json(),
    }
    target.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _draw(folder: Path) -> int:
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"{folder}: holds no results (*.json)", file=sys.stderr)
        return 1
    for path in files:
        report.write_case(folder, json.loads(path.read_text(encoding="utf-8")))
    report.write_page(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
