"""What does a training step cost under each schedule? Counted under fake tensors: `python -m benchmarks.schedules`.

The table is DESIGN's setting S by default: SD 1.5 widths, T = 3, batch 8, 256², autocast bfloat16, float32 streams and
parameters; activations only. It takes about a minute on two cores and no memory to speak of.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from idm_fast import IDM
from idm_fast.memory.count import GIB, count_training_step
from idm_fast.ops import registry

SCHEDULES = {
    "store": {"schedule": "store"},
    "two_level": {"schedule": "two_level"},
    "two_level, steps inverted": {"schedule": "two_level", "keep": []},
    "two_level, attention kept": {"schedule": "two_level", "keep": ["steps", "attention"]},
    "flat": {"schedule": "flat"},
    "flat, attention kept": {"schedule": "flat", "keep": ["attention"]},
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps T (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    lines = [
        f"One training step at batch {options.batch}, {options.size}², T = {options.steps}, SD 1.5 widths, bfloat16 autocast; "
        f"counted with torch {torch.__version__}, Python {platform.python_version()}.",
        "`fused`: each op of idm_fast is one launch that allocates its outputs; `eager`: the plain references, op by op.",
        "",
        "| schedule | ops | peak activations | held after forward | FLOP | launches |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, arguments in SCHEDULES.items():
        for ops, as_reference in (("fused", ()), ("eager", registry.OPS)):
            count = count_training_step(
                lambda arguments=arguments: IDM(steps=options.steps, **arguments),
                options.batch,
                options.size,
                as_reference=as_reference,
            )
            lines.append(
                f"| `{name}` | {ops} | {count.peak_bytes / GIB:.2f} GiB | {count.held_bytes / GIB:.2f} GiB "
                f"| {count.flop / 1e12:.1f} TFLOP | {count.launches:,} |"
            )
            print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
