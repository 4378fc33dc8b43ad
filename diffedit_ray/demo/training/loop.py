"""One training loop for all three networks: seeded, and resumable after a kill."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StepFunction = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""(step, generator) -> losses by name; "loss" is the one that is minimised."""


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        steps: Optimiser steps in all.
        learning_rate: AdamW's peak; linear warm-up, then cosine to a tenth of a percent of it.
        warmup: Steps of warm-up.
        ema: Decay of the averaged weights that are kept in the end.
        weight_decay: AdamW's.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate at `step`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class TrainingRun:
    """What all networks of one training share.

    Attributes:
        workdir: Where progress is kept.
        seed: Decides every random number.
        device: Where to train.
        warm_start: A checkpoint folder whose weights to start from instead of new ones.
    """

    workdir: Path
    seed: int
    device: torch.device
    warm_start: Path | None = None


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step, so that a resumed run draws what an unbroken one would have."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def share_gradients(network: nn.Module) -> None:
    """Average the gradients over the processes of a ``torchrun``, if this is one."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.reshape(gradient.shape))


def train(
    name: str,
    network: nn.Module,
    step_function: StepFunction,
    recipe: Recipe,
    run: TrainingRun,
    *,
    checkpoint_seconds: float = 120,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train `network` in place and leave it holding its averaged weights.

    Progress is kept in ``<workdir>/<name>.pt``; a run that finds it goes on from there. Under
    ``torchrun`` each process draws its own batch and gradients are averaged.

    Args:
        name: What log lines and the checkpoint are called.
        network: Every parameter that is to be trained.
        step_function: Computes the losses of one step.
        recipe: Length, learning rate, averaging.
        run: Where and from which seed.
        checkpoint_seconds: How much work a kill may lose.
        on_checkpoint: Called with the step after each checkpoint, the averaged weights in place.
    """
    path = run.workdir / f"{name}.pt"
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    start = 0
    if path.exists():
        saved = torch.load(path, map_location=next(network.parameters()).device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        average, start = saved["average"], saved["step"]
        logger.info("%s: resuming at step %d of %d", name, start, recipe.steps)

    def save(step: int) -> None:
        state = {
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average,
            "step": step,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    rank = dist.get_rank() if dist.is_initialized() else 0
    sums: dict[str, float] = {}
    count, logged, saved_at = 0, time.monotonic(), time.monotonic()
    for step in range(start, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        losses = step_function(step, step_generator(run.seed + 7919 * rank, step))
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        share_gradients(network)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in network.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        count += 1
        for key, loss in losses.items():
            sums[key] = sums.get(key, 0.0) + float(loss.detach())
        if rank == 0 and ((step + 1) % 50 == 0 or step + 1 == recipe.steps):
            shown = " ".join(f"{k} {v / count:.4f}" for k, v in sums.items())
            seconds = (time.monotonic() - logged) / count
            logger.info("%s: step %d/%d %s (%.3f s a step)", name, step + 1, recipe.steps, shown, seconds)
            sums, count, logged = {}, 0, time.monotonic()
        if rank == 0 and (time.monotonic() - saved_at > checkpoint_seconds or step + 1 == recipe.steps):
            save(step + 1)
            if on_checkpoint is not None:
                raw = {k: v.detach().clone() for k, v in network.state_dict().items()}
                network.load_state_dict(average)
                network.eval()
                with torch.no_grad():
                    on_checkpoint(step + 1)
                network.load_state_dict(raw)
                network.train()
            saved_at = time.monotonic()
    network.load_state_dict(average)
    network.eval()
