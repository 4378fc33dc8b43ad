"""Measure the speed of this package, on this machine.

    python jobs/benchmark.py engine                       edits a second against diffusers' DiffEdit pipeline
    python jobs/benchmark.py engine --model FOLDER --random-images --json engine.json
    python jobs/benchmark.py resume --rows 1000000        what planning a resume costs the driver

In `engine` both sides run in this process, on the same weights, pictures, texts, seeds, steps and threads, turn and
turn about, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion.checkpoint import model_revision
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.evaluation.peer import build_peer, edit_with_peer
from diffedit_ray.settings import EditSettings

PEER = "diffusers, one by one"
OURS = "diffedit_ray, one batch"


@dataclass(frozen=True)
class Row:
    """One edit to time; `image` is already at the model's own size, (H, W, 3) uint8."""

    image: np.ndarray
    reference: str
    query: str
    seed: int


def columns(rows: list[Row]) -> tuple[list[np.ndarray], list[str], list[str], list[int]]:
    """Images, references, queries and seeds, as both sides take them."""
    return [r.image for r in rows], [r.reference for r in rows], [r.query for r in rows], [r.seed for r in rows]


@dataclass
class Measure:
    """What one side took.

    Attributes:
        edits_per_second: Of each repeat.
        evaluations: UNet sample evaluations a row: a call on a batch of 4 is 4.
    """

    edits_per_second: list[float]
    evaluations: float

    @property
    def median(self) -> float:
        """Of the repeats, in edits a second."""
        return statistics.median(self.edits_per_second)


def demo_rows(count: int, side: int) -> list[Row]:
    """The shipped pictures and their edits, over again where there are fewer than `count`."""
    from diffedit_ray.demo.edits import shipped_edits

    edits = shipped_edits()
    chosen = [edits[i % len(edits)] for i in range(count)]
    resized = [np.asarray(Image.fromarray(e.image).resize((side, side), Image.Resampling.LANCZOS)) for e in chosen]
    return [Row(image, e.reference, e.query, e.seed) for image, e in zip(resized, chosen, strict=True)]


def random_rows(count: int, side: int) -> list[Row]:
    """Smooth random pictures of the given side: time does not depend on what they show."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
    images = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
    return [Row(image, "a horse on grass", "a zebra on grass", seed) for seed, image in enumerate(images)]


@contextmanager
def counted(unet: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of `unet` inside the block."""
    sizes: list[int] = []
    handle = unet.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of `run`, its work on an accelerator included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def compare(
    sides: dict[str, Callable[[], Any]], model: LatentDiffusionModel, rows: int, repeats: int
) -> dict[str, Measure]:
    """Time every side `repeats` times, interleaved, in turns that alternate who goes first."""
    measures = {name: Measure([], 0.0) for name in sides}
    for repeat in range(repeats):
        order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        for name in order:
            with counted(model.unet) as sizes:
                spent = seconds_of(sides[name], model.device)
            measures[name].edits_per_second.append(rows / spent)
            measures[name].evaluations = sum(sizes) / rows
            print(f"repeat {repeat + 1} of {repeats}: {name}: {rows / spent:.3f} edits/s", file=sys.stderr)
    return measures


def engine(args: argparse.Namespace) -> None:
    """Edits a second against diffusers' StableDiffusionDiffEditPipeline."""
    model = LatentDiffusionModel.load(args.model, args.device, args.dtype)
    # without the gate, so that each of our rows pays for all three steps as each of the peer's does
    settings = EditSettings(steps=args.steps, mask_significance=0)
    make = random_rows if args.random_images else demo_rows
    rows = make(args.images, model.geometry.native)
    peer, editor = build_peer(model), DiffEditor(model, settings, unet_batch=args.unet_batch)
    # the first call on each side pays for lazy set-up that no later one does
    brief = settings.with_overrides({"steps": 2})
    edit_with_peer(peer, *columns(rows[:1]), brief)
    DiffEditor(model, brief).edit(*columns(rows[:1]))
    sides: dict[str, Callable[[], Any]] = {
        PEER: lambda: edit_with_peer(peer, *columns(rows), settings),
        OURS: lambda: editor.edit(*columns(rows)),
    }
    measures = compare(sides, model, len(rows), args.repeats)
    print_table(measures)
    if args.json:
        args.json.write_text(json.dumps(report(measures, model, settings, args), indent=2) + "\n")


def print_table(measures: dict[str, Measure]) -> None:
    """Rates, costs, and how many times the peer's rate ours is."""
    table = Table("", "edits/s, median", "min", "max", "UNet evaluations a row", "times the peer")
    for name, m in measures.items():
        low, high = min(m.edits_per_second), max(m.edits_per_second)
        ratio = m.median / measures[PEER].median
        table.add_row(name, f"{m.median:.3f}", f"{low:.3f}", f"{high:.3f}", f"{m.evaluations:.0f}", f"{ratio:.2f}")
    Console(width=110).print(table)


def report(
    measures: dict[str, Measure], model: LatentDiffusionModel, settings: EditSettings, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is needed to read the figures later, as JSON."""
    import diffusers

    return {
        "sides": {name: {**asdict(m), "median": m.median} for name, m in measures.items()},
        "ratio": measures[OURS].median / measures[PEER].median,
        "images": args.images,
        "repeats": args.repeats,
        "native": model.geometry.native,
        "settings": settings.model_dump(),
        "model": model.source,
        "model_revision": model_revision(model.source),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def resume(args: argparse.Namespace) -> None:
    """Seconds and memory of planning a resume over many recorded rows, in a process of its own."""
    program = [sys.executable, str(Path(__file__).with_name("resume_planning.py"))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(args.folder or scratch)
        print(f"writing {args.rows:,} rows and their records, in {args.files:,} files", file=sys.stderr)
        sizes = ["--rows", str(args.rows), "--files", str(args.files)]
        subprocess.run([*program, "make", folder, *sizes], check=True)
        done = subprocess.run([*program, "measure", folder], check=True, stdout=subprocess.PIPE, text=True)
    found = {**json.loads(done.stdout), "files": args.files, "cores": os.cpu_count(), "load": os.getloadavg()}
    table = Table("", "seconds", "of a CPU", "MiB added, peak so far")
    planning = {name: found[f"planning_{name}"] for name in ("seconds", "cpu_seconds")}
    planning["peak_mib_added"] = found["planning_mib_added"]
    for name, step in {**found["steps"], "planning, all in all": planning}.items():
        times = (f"{step[kind]:.1f}" for kind in ("seconds", "cpu_seconds"))
        table.add_row(name, *times, f"{step['peak_mib_added']:.0f}")
    Console(width=110).print(table)
    print(
        f"{found['recorded']:,} recorded, {found['pending']:,} pending; bytes a row on the driver: "
        f"{found['bytes_a_manifest_row']:.0f} for the manifest, {found['bytes_a_recorded_row']:.0f} for the records; "
        f"{found['bytes_shipped_a_row']:.0f} to each node"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("engine", help=engine.__doc__)
    command.add_argument("--model", default=str(demo_model()), help="a checkpoint's folder, or its id on the hub")
    command.add_argument("--random-images", action="store_true", help="instead of the shipped pictures")
    command.add_argument("--images", type=int, default=8, help="edits a repeat")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--unet-batch", type=int, default=64, help="latents our UNet calls see at once, at most")
    command.add_argument("--device", default="auto")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--threads", type=int, help="torch threads; torch's own choice if not given")
    command.add_argument("--json", type=Path, help="write the figures here too")
    command.set_defaults(run=engine)
    command = commands.add_parser("resume", help=resume.__doc__)
    command.add_argument("--rows", type=int, default=1_000_000)
    command.add_argument("--files", type=int, default=1000, help="record files, as runs leave that were stopped")
    command.add_argument("--folder", type=Path, help="keep what is written here; else it is temporary")
    command.add_argument("--json", type=Path, help="write the figures here too")
    command.set_defaults(run=resume)
    args = parser.parse_args()
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
