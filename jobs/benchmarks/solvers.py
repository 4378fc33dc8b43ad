"""What fewer steps and another solver cost in quality and bring in speed, on scenes whose true masks are known."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from diffedit_ray.demo import CLASSIFIER, demo_model, demo_settings
from diffedit_ray.demo.edits import HELD_OUT, known_edit, shipped_edits
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.evaluation.judge import ObjectClassifier
from diffedit_ray.evaluation.known_truth import KnownEdit, Quality, measure
from diffedit_ray.settings import EditSettings

CANDIDATES = (("ddim", 50), ("ddim", 25), ("ddim", 20), ("dpm++", 25), ("dpm++", 20), ("dpm++", 15))
TIMED = 8
"""Edits that are timed, in one batch."""


def edits_per_second(
    editor: DiffEditor, edits: Sequence[KnownEdit], settings: Sequence[EditSettings], repeats: int
) -> list[float]:
    """The best of some repeats, the candidates taking turns."""
    best = [0.0] * len(settings)
    columns = (
        [e.image for e in edits],
        [e.reference for e in edits],
        [e.query for e in edits],
        [e.seed for e in edits],
    )
    for _ in range(repeats):
        for i, s in enumerate(settings):
            began = time.perf_counter()
            # every candidate pays for all three steps of every row
            editor.edit(*columns, settings=s.with_overrides({"mask_significance": 0.0}))
            best[i] = max(best[i], len(edits) / (time.perf_counter() - began))
    return best


def solvers(args: argparse.Namespace) -> None:
    """Mask IoU, background, edit success and speed of every solver and number of steps, on the embedded world."""
    if args.threads:
        torch.set_num_threads(args.threads)
    editor = DiffEditor(LatentDiffusionModel.load(demo_model(), args.device))
    judge = ObjectClassifier.load(demo_model() / CLASSIFIER)
    shipped = shipped_edits()
    few = args.count <= len(shipped)
    edits = shipped[: args.count] if few else [known_edit(HELD_OUT + i) for i in range(args.count)]
    settings = [demo_settings().with_overrides({"solver": solver, "steps": steps}) for solver, steps in CANDIDATES]
    rates = edits_per_second(editor, edits[:TIMED], settings, args.repeats)
    table = Table("solver", "steps", "mask IoU", "background, dB", "edit success", "edits/s", "times 50-step DDIM")
    found: list[tuple[EditSettings, Quality, float]] = []
    for s, rate in zip(settings, rates, strict=True):
        quality, _ = measure(editor, judge, edits, s)
        found.append((s, quality, rate))
        figures = (f"{max(quality.iou.values()):.3f}", f"{quality.background_psnr:.2f}", f"{quality.success:.3f}")
        table.add_row(s.solver, str(s.steps), *figures, f"{rate:.3f}", f"{rate / rates[0]:.2f}")
        print(f"{s.solver}, {s.steps} steps: {figures}", file=sys.stderr)
    Console(width=100).print(table)
    print(f"{len(edits)} edits, {torch.get_num_threads()} threads; mask IoU at the best single threshold")
    if args.json:
        report = [{"solver": s.solver, "steps": s.steps, "edits_per_second": rate, **asdict(q)} for s, q, rate in found]
        args.json.write_text(json.dumps(report, indent=2) + "\n")
