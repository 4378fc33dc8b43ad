"""Measure the speed of this package, on this machine.

    python jobs/benchmark.py engine                       edits a second against diffusers' DiffEdit pipeline
    python jobs/benchmark.py engine --random-weights sd15 --profile --json engine.json --chart engine.png
    python jobs/benchmark.py pipeline --rows 200          the whole Ray job against the bare engine
    python jobs/benchmark.py solvers --count 200          what fewer steps cost in quality and bring in speed
    python jobs/benchmark.py scaling --replicas 1,4,16    how busy the job keeps many replicas, simulated
    python jobs/benchmark.py resume --rows 1000000        what planning a resume costs the driver

In `engine` all contestants run in this process, on the same weights, pictures, texts, seeds, steps and threads, turn
and turn about, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.engine import CONTESTANTS, engine
from benchmarks.pipeline import pipeline
from benchmarks.random_weights import ARCHITECTURES
from benchmarks.resume import resume
from benchmarks.scaling import scaling
from benchmarks.solvers import solvers
from diffedit_ray.demo import demo_model


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such contestant: {', '.join(unknown)}; there are {CONTESTANTS}")
    return names


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("counts are at least 1")
    return counts


def _on_a_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--device", default="auto")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--threads", type=int, help="torch threads, the same for all sides")


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default=str(demo_model()), help="a checkpoint's folder, or its id on the hub")
    command.add_argument(
        "--random-weights",
        choices=sorted(ARCHITECTURES),
        help="instead of a checkpoint, that architecture at full size with random weights: for timing, the pictures "
        "mean nothing. sdxl has its UNet, autoencoder and text encoders, but gets zeros for the size and pooled text "
        "that SDXL also takes; it can be timed so and not used",
    )
    command.add_argument("--shrink", action="store_true", help="random weights in narrow shapes: to try, not to time")
    command.add_argument("--random-images", action="store_true", help="instead of the shipped pictures")
    command.add_argument("--images", type=int, default=10, help="edits of each contestant a repeat")
    command.add_argument(
        "--peer-images",
        type=int,
        help="diffusers edits only so many of them a repeat: it takes as long for each, however many there are",
    )
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--only", type=_names, default=list(CONTESTANTS), help=f"of {','.join(CONTESTANTS)}")
    command.add_argument("--batch", type=int, help="rows our editor gets at once; else all")
    command.add_argument("--unet-batch", type=int, default=64, help="latents our UNet calls see at once, at most")
    command.add_argument("--compile", action="store_true", help="compile our UNet")
    command.add_argument("--peer-batch", type=int, default=5, help="images diffusers gets at once, where in batches")
    _on_a_device(command)
    command.add_argument("--profile", action="store_true", help="the longest kernels, and the share of the matmul peak")
    command.add_argument("--chart", type=Path, help="write a PNG here")


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="demo", help="demo, or a checkpoint's folder")
    command.add_argument("--rows", type=int, default=200)
    command.add_argument("--batch", type=int, default=16, help="rows an actor, and the bare engine, gets at once")
    _on_a_device(command)


def _add_solvers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--count", type=int, default=200, help="held-out edits; up to 48 they are shipped, more need the emoji font"
    )
    command.add_argument("--repeats", type=int, default=3, help="of the timing")
    command.add_argument("--device", default="auto")
    command.add_argument("--threads", type=int, help="torch threads")


def _add_scaling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--replicas", type=_counts, default=[1, 4, 16, 64])
    command.add_argument(
        "--seconds", type=float, default=5.0, help="a batch takes: 16 edits on an H200 at 3.4 edits/s are about 5 s"
    )
    command.add_argument("--batches", type=int, default=40, help="of each replica")
    command.add_argument("--batch", type=int, default=4, help="rows a batch; few, as all of them share this machine")
    command.add_argument("--extrapolate", type=int, default=1000, help="replicas to reckon the driver's load for")
    command.add_argument("--folder", type=Path, help="where the simulated job writes; else the temporary folder")


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rows", type=int, default=1_000_000)
    command.add_argument("--files", type=int, default=1000, help="record files, as runs leave that were stopped")
    command.add_argument("--folder", type=Path, help="keep what is written here; else it is temporary")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known: dict[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None]] = {
        engine: _add_engine,
        pipeline: _add_pipeline,
        solvers: _add_solvers,
        scaling: _add_scaling,
        resume: _add_resume,
    }
    for run, add in known.items():
        command = commands.add_parser(run.__name__, help=run.__doc__)
        add(command)
        command.add_argument("--json", type=Path, help="write the figures here too")
        command.set_defaults(run=run)
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
