"""Edits a second of the engine against diffusers' own DiffEdit, in one process on the same weights."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import kernels
from benchmarks.chart import draw
from benchmarks.machine import machine
from benchmarks.measure import Contestant, Measure, compare
from benchmarks.random_weights import random_model
from benchmarks.workload import Row, columns, demo_rows, five_queries, random_rows
from diffedit_ray.diffusion.checkpoint import model_revision
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.evaluation.peer import build_peer, edit_with_peer
from diffedit_ray.settings import EditSettings

PEER, PEER_BATCHES, OURS, OURS_FIVE, OURS_FAST = "peer", "peer-batches", "ours", "ours-five", "ours-fast"
CONTESTANTS = (PEER, PEER_BATCHES, OURS, OURS_FIVE, OURS_FAST)
FAST_STEPS = 20


def fast_settings(settings: EditSettings) -> EditSettings:
    """Those of fast mode."""
    fast: EditSettings = settings.with_overrides({"solver": "dpm++", "steps": min(FAST_STEPS, settings.steps)})
    return fast


def as_loaded(model: LatentDiffusionModel) -> LatentDiffusionModel:
    """A copy of the networks as diffusers loads them."""
    return replace(model, vae=_plain(model.vae), unet=_plain(model.unet))


def _plain(network: Any) -> Any:
    """A network's own architecture anew, without what we have replaced in it, on copies of its weights."""
    with torch.device("meta"):
        fresh = type(network).from_config(network.config)
    weights = {
        name: weight.clone(memory_format=torch.contiguous_format) for name, weight in network.state_dict().items()
    }
    fresh.load_state_dict(weights, assign=True)
    return fresh.eval().requires_grad_(False)


def contestants_for(
    model: LatentDiffusionModel,
    plain: LatentDiffusionModel,
    scheduler: dict[str, Any] | None,
    settings: EditSettings,
    args: argparse.Namespace,
) -> dict[str, tuple[Contestant, Callable[[EditSettings], Any]]]:
    """Those that are asked for, each with a way to run it under other settings."""
    make = random_rows if args.random_images or args.random_weights else demo_rows
    rows = make(args.images, model.geometry.native)
    grouped = five_queries(rows)
    peer_rows = rows[: args.peer_images]
    peer = build_peer(plain, scheduler)
    editor = DiffEditor(model, settings, unet_batch=args.unet_batch)

    def theirs(batch: int | None) -> Callable[[EditSettings], Any]:
        return lambda s: edit_with_peer(peer, *columns(peer_rows), s, batch=batch)

    def ours(edited: list[Row]) -> Callable[[EditSettings], Any]:
        size = args.batch or len(edited)

        def run(s: EditSettings) -> None:
            for start in range(0, len(edited), size):
                editor.edit(*columns(edited[start : start + size]), settings=s)

        return run

    known = {
        PEER: ("diffusers, one by one", theirs(None), settings),
        PEER_BATCHES: (f"diffusers, batches of {args.peer_batch}", theirs(args.peer_batch), settings),
        OURS: ("diffedit_ray, one query an image", ours(rows), settings),
        OURS_FIVE: ("diffedit_ray, five queries an image", ours(grouped), settings),
        OURS_FAST: ("diffedit_ray, fast mode", ours(rows), fast_settings(settings)),
    }
    chosen: dict[str, tuple[Contestant, Callable[[EditSettings], Any]]] = {}
    for key in CONTESTANTS:
        name, run, own = known[key]
        if key in args.only:
            edited = len(peer_rows if key in (PEER, PEER_BATCHES) else rows)
            chosen[key] = (Contestant(name, edited, _bound(run, own)), run)
    return chosen


def _bound(run: Callable[[EditSettings], Any], settings: EditSettings) -> Callable[[], Any]:
    return lambda: run(settings)


def engine(args: argparse.Namespace) -> None:
    """Edits a second against diffusers' StableDiffusionDiffEditPipeline."""
    if args.threads:
        torch.set_num_threads(args.threads)
    scheduler = None
    if args.random_weights:
        model, scheduler = random_model(args.random_weights, args.device, args.dtype, shrunken=args.shrink)
    else:
        model = LatentDiffusionModel.load(args.model, args.device, args.dtype)
    # the peer runs as its documentation shows, not on weights that we have laid out or compiled
    plain = as_loaded(model)
    if args.compile:
        model.compile(args.unet_batch)
    # without the gate, so that each of our rows pays for all three steps as each of the peer's does
    settings = EditSettings(steps=args.steps, mask_significance=0)
    chosen = contestants_for(model, plain, scheduler, settings, args)
    watched = kernels.networks(model, plain)
    for contestant, run in chosen.values():
        # the first call pays for lazy set-up that no later one does, at these very shapes
        print(f"warming up: {contestant.name}", file=sys.stderr)
        run(settings.with_overrides({"steps": 2}))
    contestants = {key: contestant for key, (contestant, _) in chosen.items()}
    measures = compare(contestants, watched, model.device, args.repeats)
    found = report(contestants, measures, model, settings, args)
    if args.profile:
        found["profile"] = profile_of(contestants, measures, model)
    print_tables(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.chart:
        title = f"{model.source if args.random_weights else found['model_revision']} · {found['machine']['device']}"
        draw({key: (c.name, measures[key]) for key, c in contestants.items()}, title, args.chart)


def report(
    contestants: dict[str, Contestant],
    measures: dict[str, Measure],
    model: LatentDiffusionModel,
    settings: EditSettings,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is needed to read the figures later, as JSON."""
    first = next(iter(measures.values())).median
    return {
        "contestants": {
            key: {
                **asdict(m),
                "name": contestants[key].name,
                "median": m.median,
                "min": min(m.edits_per_second),
                "max": max(m.edits_per_second),
                "ratio": m.median / first,
                "evaluations": m.samples["unet"],
            }
            for key, m in measures.items()
        },
        "repeats": args.repeats,
        "batch": args.batch,
        "unet_batch": args.unet_batch,
        "compiled": args.compile,
        "native": model.geometry.native,
        "settings": settings.model_dump(),
        "model": model.source,
        "model_revision": None if args.random_weights else model_revision(model.source),
        "weights_mib": sum(
            p.numel() * p.element_size() for n in (model.unet, model.vae, model.text_encoder) for p in n.parameters()
        )
        / 2**20,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": {**machine(model.device), "system": platform.platform()},
    }


def profile_of(
    contestants: dict[str, Contestant], measures: dict[str, Measure], model: LatentDiffusionModel
) -> dict[str, Any]:
    """The longest kernels of our plain contestant, and every contestant's share of the matrix-product peak."""
    peak = kernels.matmul_peak(model.device, model.dtype)
    flops = kernels.flops_a_sample(model)
    key = OURS if OURS in contestants else next(iter(contestants))
    work = {name: kernels.work_a_row(m.samples, flops) for name, m in measures.items()}
    return {
        "matmul_peak": peak,
        "flops_a_sample": flops,
        "flops_a_row": work,
        "share_of_peak": {name: work[name] * m.median / peak for name, m in measures.items()},
        "profiled": key,
        "kernels": kernels.top_kernels(contestants[key].run, model.device),
    }


def print_tables(found: dict[str, Any]) -> None:
    """Rates, costs and ratios; with a profile the longest kernels too."""
    console = Console(width=130)
    shares = found.get("profile", {}).get("share_of_peak", {})
    heads = ["", "edits/s, median", "min", "max", "times the first", "UNet evaluations a row", "MiB above before"]
    table = Table(*heads, *(["of the matmul peak"] if shares else []))
    for key, c in found["contestants"].items():
        rates = (f"{c[name]:.3f}" for name in ("median", "min", "max"))
        memory = "not measured" if c["peak_mib"] is None else f"{c['peak_mib']:,.0f}"
        share = [f"{100 * shares[key]:.1f} %"] if shares else []
        table.add_row(c["name"], *rates, f"{c['ratio']:.2f}", f"{c['evaluations']:g}", memory, *share)
    console.print(table)
    if "profile" not in found:
        return
    profile = found["profile"]
    console.print(
        f"matmul peak {profile['matmul_peak'] / 1e12:.3g} TFLOP/s in {found['dtype']}; one UNet evaluation is "
        f"{profile['flops_a_sample']['unet'] / 1e12:.3g} TFLOP"
    )
    table = Table(f"longest in: {found['contestants'][profile['profiled']]['name']}", "share", "ms", "calls")
    for kernel in profile["kernels"]:
        name = kernel["name"] if len(kernel["name"]) <= 80 else kernel["name"][:79] + "…"
        table.add_row(name, f"{100 * kernel['share']:.1f} %", f"{kernel['milliseconds']:,.1f}", str(kernel["calls"]))
    console.print(table)
