"""Train the embedded model from nothing but drawn scenes, and measure it.

    python jobs/train_demo_model.py                train (resuming), write the checkpoint
    python jobs/train_demo_model.py --evaluate     measure the checkpoint on held-out scenes

    torchrun --nproc-per-node 2 jobs/train_demo_model.py --threads 1    train in two processes

Needs the emoji font (Debian: fonts-noto-color-emoji). A run that is killed goes on where it
was when started again: scenes and progress are kept in --workdir.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffedit_ray.demo import CLASSIFIER, demo_manifest, demo_model, demo_settings
from diffedit_ray.demo.assets import write_assets
from diffedit_ray.demo.edits import HELD_OUT, known_edit, shipped_edits
from diffedit_ray.demo.scenes import draw_scene
from diffedit_ray.demo.training.autoencoder import train_autoencoder
from diffedit_ray.demo.training.checkpoint import save_checkpoint
from diffedit_ray.demo.training.classifier import train_classifier
from diffedit_ray.demo.training.denoiser import build_scheduler, train_denoiser
from diffedit_ray.demo.training.loop import TrainingRun
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel, resolve_device
from diffedit_ray.evaluation.judge import ObjectClassifier
from diffedit_ray.evaluation.known_truth import measure
from diffedit_ray.gallery.contact_sheet import card, sheet

FIRST_SEED = 1_000_000
KEPT_ASIDE = 256  # scenes no network trains on, for the measures printed on the way

logger = logging.getLogger("train")


def _drawn(seed: int) -> tuple[Any, Any, str, list[tuple[str, tuple[int, int, int, int]]]]:
    scene = draw_scene(seed)
    return scene.image, scene.kinds, scene.background, [(o.kind, o.box) for o in scene.objects]


def load_scenes(workdir: Path, count: int) -> tuple[torch.Tensor, list[Any]]:
    """Draw `count` scenes, or read them back: (count, 3, 128, 128) uint8, and (kinds, background, objects) of each."""
    images, truth = workdir / f"scenes-{count}.npy", workdir / f"scenes-{count}.pkl"
    if not truth.exists():
        logger.info("drawing %d scenes", count)
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(_drawn, range(FIRST_SEED, FIRST_SEED + count), chunksize=64))
        np.save(images, np.stack([d[0] for d in drawn]))
        truth.write_bytes(pickle.dumps([d[1:] for d in drawn]))
    return torch.from_numpy(np.load(images)).permute(0, 3, 1, 2), pickle.loads(truth.read_bytes())


def train_all(args: argparse.Namespace) -> None:
    """Scenes → decoder → UNet and text encoder → classifier → checkpoint; finished parts are not done again."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    run = TrainingRun(args.workdir, args.seed, resolve_device(args.device), args.warm_start)
    images, truth = load_scenes(args.workdir, args.scenes + KEPT_ASIDE)
    training, aside = images[:-KEPT_ASIDE], images[-KEPT_ASIDE:]
    vae, code = train_autoencoder(training, aside, run, steps=args.autoencoder_steps, batch=6)
    if args.only == "autoencoder":
        return
    latents = torch.cat([code(part.float() / 127.5 - 1) for part in training.split(256)]) * vae.config.scaling_factor
    scenes = [(kinds, background) for kinds, background, _ in truth[: len(latents)]]
    unet, text_encoder, tokenizer = train_denoiser(latents, scenes, run, steps=args.denoiser_steps, batch=32)
    objects = [several for _, _, several in truth]
    classifier = train_classifier(training, objects[: len(training)], run, steps=args.classifier_steps, batch=64)
    if dist.is_initialized() and dist.get_rank():
        return
    save_checkpoint(args.output, vae.cpu(), unet.cpu(), text_encoder.cpu(), tokenizer, build_scheduler())
    classifier.cpu().save(args.output / CLASSIFIER)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    logger.info("wrote %s, %.1f MB", args.output, size / 1e6)


def evaluate(args: argparse.Namespace) -> None:
    """Print the quality of the checkpoint on held-out scenes, as a table and as JSON."""
    judge = ObjectClassifier.load(args.output / CLASSIFIER)
    editor = DiffEditor(LatentDiffusionModel.load(args.output, args.device))
    settings = demo_settings()
    if args.set:
        settings = settings.with_overrides(dict(pair.split("=", 1) for pair in args.set))
    edits = shipped_edits() if args.shipped else [known_edit(HELD_OUT + i) for i in range(args.count)]
    quality, _ = measure(editor, judge, edits, settings)
    print(f"{quality.edits} held-out edits, {settings.model_dump(exclude_defaults=True)}")
    print(f"  autoencoder PSNR            {quality.autoencoder_psnr:6.2f} dB")
    for threshold, iou in quality.iou.items():
        best = "  <- best" if threshold == quality.best_threshold else ""
        print(f"  mask IoU at {threshold:4.2f}            {iou:6.3f}{best}")
    print(f"  background PSNR             {quality.background_psnr:6.2f} dB")
    print(f"  edit success                {quality.success:6.3f}")
    print(f"  classifier on real scenes   {quality.classifier_accuracy:6.3f}")
    print(json.dumps(vars(quality)))


PICTURED = 12


def draw_picture(args: argparse.Namespace) -> None:
    """The README's picture: the demo's first twelve pictures and what became of them."""
    editor = DiffEditor(LatentDiffusionModel.load(args.output, args.device))
    edits = shipped_edits()[:PICTURED]
    result = editor.edit(
        [e.image for e in edits],
        [e.reference for e in edits],
        [e.query for e in edits],
        [e.seed for e in edits],
        settings=demo_settings(),
    )
    cards = [
        card([e.image, mask, image], e.reference, e.query)
        for e, mask, image in zip(edits, result.masks, result.images, strict=True)
    ]
    sheet(cards, columns=3).save(args.picture, optimize=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint instead of training")
    parser.add_argument("--assets", action="store_true", help="draw the shipped images, masks and manifest anew")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw twelve edits, before · mask · after")
    parser.add_argument("--count", type=int, default=200, help="held-out edits to measure on")
    parser.add_argument("--shipped", action="store_true", help="measure on the shipped pictures, which need no font")
    parser.add_argument("--set", action="append", metavar="SETTING=VALUE", help="an EditSettings field for --evaluate")
    parser.add_argument("--output", type=Path, default=demo_model(), help="the checkpoint's folder")
    parser.add_argument("--workdir", type=Path, default=Path("training"), help="scenes and progress")
    parser.add_argument("--warm-start", type=Path, metavar="FOLDER", help="start from a checkpoint's weights")
    parser.add_argument("--only", choices=["autoencoder"], help="stop after this part")
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--autoencoder-steps", type=int, default=650)
    parser.add_argument("--denoiser-steps", type=int, default=6000)
    parser.add_argument("--classifier-steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout, force=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.assets:
        write_assets(demo_manifest().parent)
    elif args.picture:
        draw_picture(args)
    elif args.evaluate:
        evaluate(args)
    else:
        train_all(args)


if __name__ == "__main__":
    main()
