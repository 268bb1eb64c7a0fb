"""The command `idm-fast`: parsing, help texts, and what an error looks like. The work is in `idm_fast.commands`.

Nothing here imports torch, so that `--help` and misspelt flags answer at once. What a user did wrong is one line on
stderr and exit code 2; 130 after Ctrl-C; anything else that fails is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from idm_fast import __version__
from idm_fast.outputs import InputError
from idm_fast.training.config import add_training_arguments

INPUT_ERROR, INTERRUPTED, CUT_OFF = 2, 130, 141
IMPLEMENTATIONS = ("auto", "cuda", "triton", "cpu", "reference")

OVERVIEW = """\
Reconstructs images from few linear measurements with Invertible Diffusion Models (IDM), and trains such networks.

  idm-fast reconstruct photo.png                   sense a photograph and get it back
  idm-fast evaluate --data_dir Set11               PSNR and SSIM by the published protocol
  idm-fast train --train_data_dir photos --output_dir my_weights --model tiny --resolution 64
  idm-fast plan --budget 12GiB                     how to train within so much memory
  idm-fast bench --quick                           tables and plots of speed and memory on this machine
  idm-fast doctor                                  what this machine has and what runs on it

`idm-fast COMMAND --help` explains each with examples."""

RECONSTRUCT = """\
Senses images (block compressed sensing: y = A x) and reconstructs them from y alone, or reconstructs from a file of
measurements. Images of any size are zero-padded to the block size and cut back. Results are NAME_idm.png."""

RECONSTRUCT_EXAMPLES = """\
examples:
  idm-fast reconstruct photo.png
      measures 10 % of what the photograph has, reconstructs its luma, says PSNR and SSIM
  idm-fast reconstruct photo.jpg --channels rgb --cs_ratio 0.25 --weights my_weights --compare
      each colour channel; and photo_comparison.png: original, Aᵀy, IDM, error
  idm-fast reconstruct photo.png --save_measurements --output_dir out
  idm-fast reconstruct out/photo_measurements.npz
      the second needs the measurements only: the ratio, the seed and the sizes stand in the file

What is read: the first frame, turned as EXIF says; 8 and 16 bits, palette, gray, 1-bit, CMYK;
alpha is dropped."""

EVALUATE = """\
The published test protocol: luma, zero padding to the block size, one seed for the sensing matrix and for the
permutations of all images in the order of their names, PSNR on clamped unrounded values, SSIM of scikit-image."""

EVALUATE_EXAMPLES = """\
examples:
  idm-fast evaluate --data_dir Set11
  idm-fast evaluate --data_dir Set11 --cs_ratio 0.1 0.25 0.5 --weights my_weights --output_dir set11 --save_images

writes results.csv (a line an image and ratio) and results.json (settings, versions, averages, images); with
--save_images also ratio_0.1/NAME_idm.png and ratio_0.1/NAME_comparison.png for each image and ratio."""

TRAIN = """\
Trains an IDM end to end. The defaults are the published recipe: Adam 1e-4, halved at 20, 40, 60 and 80 % of the steps,
L1 loss, random 256² crops, one of 8 flips and rotations and a new permutation of the pixels for every batch."""

TRAIN_EXAMPLES = """\
examples:
  idm-fast train --train_data_dir photos --output_dir tiny --model tiny --resolution 64 --max_train_seconds 1800
      half an hour on a CPU
  idm-fast train --train_data_dir photos --output_dir sd --pretrained_model_name_or_path stable-diffusion-v1-5 \\
      --cs_ratio 0.1 0.25 0.5 --mixed_precision bf16 --validation_data_dir Set11
      from the weights of Stable Diffusion 1.5 in a local folder (or a hub name); one network for three ratios
  idm-fast train …the same… --resume_from_checkpoint latest
      continues after an interruption, with the same losses as if there had been none
  accelerate launch -m idm_fast.cli train …
      on several GPUs

output_dir gets the final weights (use them as --weights), checkpoint-N/ folders and metrics.jsonl."""

PLAN = """\
Finds how to train within a memory budget. Backward needs what forward computed; a training step may store it, recover it by
inverting the layers, or run whole sampling steps again. Every mixture has its peak memory and its FLOP; the one with the
fewest FLOP that fits is chosen. Nothing is trained: the real model is counted without data, on any machine."""

PLAN_EXAMPLES = """\
examples:
  idm-fast plan --budget 12GiB
      Stable Diffusion 1.5's widths, T = 3, batch 8, 256²; about half a minute
  idm-fast plan --card 24GiB --batch 4 --size 512 --plot plan.png
      a whole card: parameters, gradients and Adam states are taken off first. Leave a few percent for CUDA itself
  idm-fast plan --card 24GiB --largest batch
      the largest batch that fits at all; likewise --largest size, --largest steps

Memory is of activations, as `IDM(memory_budget="12GiB")` takes it. > marks the choice, * the Pareto front: nothing else
has both less memory and fewer FLOP."""

BENCH = """\
Runs the benchmark suite: memory, training step, inference, kernels, reversible layers against other libraries, numerics,
quality, scaling. It is part of the source repository, not of the installed package: this is `python -m benchmarks` in the
checkout that idm-fast is installed from (pip install --editable '.[bench]') or that is the current folder."""

BENCH_EXAMPLES = """\
examples:
  idm-fast bench --device cpu --quick --out quick
  idm-fast bench --device cuda --only kernels inference --out results
      leaves results/fastest.json: the fastest implementation of each operation here, for IDM_FAST_IMPL or --impl
  idm-fast bench list
  idm-fast bench compare before after
      exit code 1 when something got worse"""

DOCTOR = "Versions, devices, threads, which implementation of each operation runs here and why, what is not there yet."


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(INPUT_ERROR, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and not {"-h", "--help"} & set(words):
        words.insert(1, "--")  # what looks like options belongs to the suite
    arguments = build_parser().parse_args(words)
    try:
        importlib.import_module(f"idm_fast.commands.{arguments.command}").run(arguments)
    except InputError as error:
        print(f"idm-fast {arguments.command}: error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except RuntimeError as error:
        message = _not_a_bug(error)
        if message is None:
            raise
        print(f"idm-fast {arguments.command}: error: {message}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print(f"idm-fast {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python writes at its end
        return CUT_OFF
    return 0


def _not_a_bug(error: RuntimeError) -> str | None:
    """One line for the two RuntimeErrors that a user can do something about, None for all others."""
    text = str(error).strip()
    if text.startswith("environment variable IDM_FAST_IMPL"):
        return text
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "not enough memory for this image or batch; use smaller ones, or a device with more memory"
    return None


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser("idm-fast", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"idm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(_command(commands, "train", "train a network on a folder of images", TRAIN, TRAIN_EXAMPLES))
    _add_reconstruct(
        _command(commands, "reconstruct", "sense and reconstruct images", RECONSTRUCT, RECONSTRUCT_EXAMPLES)
    )
    _add_evaluate(_command(commands, "evaluate", "measure PSNR and SSIM on a folder", EVALUATE, EVALUATE_EXAMPLES))
    _add_plan(_command(commands, "plan", "choose how to train within a memory budget", PLAN, PLAN_EXAMPLES))
    bench = _command(commands, "bench", "run the benchmark suite (in a checkout)", BENCH, BENCH_EXAMPLES)
    bench.add_argument("arguments", nargs="*", metavar="…", help="what `python -m benchmarks` takes")
    _command(commands, "doctor", "say what this machine has and what runs on it", DOCTOR, "")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, summary: str, text: str, examples: str) -> _Parser:
    return commands.add_parser(
        name, help=summary, description=text, epilog=examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)


def _add_reconstruct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image file, folder of images, or measurements (.npz) saved earlier"
    )
    sensing = parser.add_argument_group("sensing (of images; a .npz says it itself)")
    sensing.add_argument(
        "--cs_ratio", type=_ratio, metavar="R",
        help="measurements a pixel, in (0, 1] (default: the smallest that the weights were trained for)",
    )
    sensing.add_argument(
        "--channels", choices=("y", "rgb"), help="y: luma, written as a gray image; rgb: each channel (default: y)"
    )
    _add_sensing(sensing)
    _add_network(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="reconstructed", metavar="DIR", help="(default: %(default)s)")
    output.add_argument(
        "--save_measurements", action="store_true", help="also write NAME_measurements.npz, enough to reconstruct from"
    )
    output.add_argument(
        "--compare", action="store_true",
        help="also write NAME_comparison.png: original (where known), Aᵀy, IDM, error x5"
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder of test images")
    sensing = parser.add_argument_group("sensing")
    sensing.add_argument(
        "--cs_ratio", type=_ratio, nargs="+", metavar="R",
        help="one or several ratios in (0, 1] (default: all that the weights were trained for)",
    )
    _add_sensing(sensing)
    _add_network(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="evaluation", metavar="DIR", help="(default: %(default)s)")
    output.add_argument("--save_images", action="store_true", help="also write each reconstruction and a comparison")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--budget", metavar="BYTES", help="for activations, as 12GiB or 500MiB")
    memory.add_argument(
        "--card", metavar="BYTES", help="for all of the training: the budget is this less parameters, gradients, Adam states"
    )
    step = parser.add_argument_group("training step")
    step.add_argument("--batch", type=_positive, default=8, metavar="N", help="images (default: %(default)s)")
    step.add_argument(
        "--size", type=_positive, default=256, metavar="N", help="their side in pixels, a multiple of 32 (default: %(default)s)"
    )
    step.add_argument("--steps", type=_positive, default=3, metavar="T", help="sampling steps (default: %(default)s)")
    step.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="bf16", help="(default: %(default)s)")
    step.add_argument("--model", choices=("sd15", "tiny"), default="sd15", help="(default: %(default)s)")
    parser.add_argument(
        "--largest", choices=("batch", "size", "steps"), help="instead: the largest that fits, all else as given"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the choices (needs matplotlib)")


def _add_sensing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--block_size", type=_block_size, metavar="B",
        help="side of a sensing block in pixels (default: what the weights were trained for, else 32)",
    )
    group.add_argument(
        "--seed", type=_seed, help="of matrix and permutation (default: what the weights were trained for, else 2025)"
    )
    group.add_argument(
        "--any_ratio", action="store_true", help="allow a ratio or block size that the weights were not trained for"
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights", metavar="DIR",
        help="folder written by `idm-fast train`, or a published net_params_N.pkl "
        "(default: the tiny weights of the package)",
    )
    group.add_argument(
        "--step_number", type=_positive, metavar="T",
        help="refuse weights that were trained for another number of steps"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    group.add_argument(
        "--impl", type=_implementation, metavar="NAME", default="auto",
        help=f"implementation of the operations, one of {', '.join(IMPLEMENTATIONS)} (see `idm-fast doctor`), or the "
        "fastest.json of a benchmark run on this machine, which names one for each (default: %(default)s)",
    )


def _implementation(text: str) -> str:
    if text not in IMPLEMENTATIONS and not text.endswith(".json"):
        known = ", ".join(IMPLEMENTATIONS)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, nor the .json file of a benchmark run")
    return text


def _ratio(text: str) -> float:
    value = _number(text, float)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]; 0.1 measures 10 %")
    return value


def _positive(text: str) -> int:
    value = int(_number(text, int))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _block_size(text: str) -> int:
    value = int(_number(text, int))
    if value < 8 or value % 4:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 4 of at least 8; 32 is usual")
    return value


def _seed(text: str) -> int:
    value = int(_number(text, int))
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 … 2³²-1")
    return value


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None


if __name__ == "__main__":
    sys.exit(main())
