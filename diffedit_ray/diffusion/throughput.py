"""How many latents the UNet should see at once: measured where it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from diffedit_ray.diffusion.model import LatentDiffusionModel

DEFAULT_BATCH = 64
"""Latents at once where nothing is measured."""
LARGEST_BATCH = 256
"""A batch of rows hardly ever gives more latents than this at once."""
LEAST_GAIN = 0.05
"""Throughput that a doubled batch must add to be worth its memory, as a share."""
BUDGET_SECONDS = 6.0
"""What the search may take, where one evaluation takes no longer than that."""
MEMORY_SHARE = 0.8
"""Share of an accelerator's memory that the search may use; the autoencoder and larger images need the rest."""


@dataclass(frozen=True)
class Throughput:
    """What a search has found.

    Attributes:
        batch: The smallest batch within `LEAST_GAIN` of the best.
        rates: Batch size -> latents a second, of every size tried.
    """

    batch: int
    rates: Mapping[int, float]


def find_knee(
    run: Callable[[int], None],
    *,
    limit: int = LARGEST_BATCH,
    budget: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Double the batch until that gains nothing, or memory or time runs out.

    Args:
        run: Evaluates the UNet once on that many latents and returns when it is done.
        limit: The largest batch to try.
        budget: Seconds the search may take; the first size is measured whatever it takes.
        clock: Seconds, from anywhere.

    Raises:
        torch.OutOfMemoryError: Not even one latent fits.
    """
    began = clock()
    rates: dict[int, float] = {}
    size = 1
    while size <= limit:
        try:
            seconds = _seconds(lambda size=size: run(size), clock)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        rates[size] = size / seconds
        if _past_knee(list(rates.values())) or clock() - began + 2 * seconds > budget:
            break
        size *= 2
    enough = max(rates.values()) / (1 + LEAST_GAIN)
    return Throughput(min(size for size, rate in rates.items() if rate >= enough), rates)


def _seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """What one call takes, the first of a shape apart: kernels are chosen in it."""
    began = clock()
    run()
    first = clock() - began
    if first > 0.5:  # what a choice costs is lost in this
        return first
    began = clock()
    run()
    return clock() - began


def _past_knee(rates: list[float]) -> bool:
    # rates are no smooth curve: two doublings must fail, and below a batch of 8 no processor is full
    return len(rates) > 5 and max(rates[-2:]) < max(rates[:-2]) * (1 + LEAST_GAIN)


def measure_unet_batch(model: LatentDiffusionModel) -> Throughput:
    """Find the knee for latents of the model's own size, on the device it is on. Takes a few seconds.

    Raises:
        torch.OutOfMemoryError: Not even one latent fits.
    """
    side = model.geometry.native // model.geometry.factor
    embedding = model.embed_prompts([""])

    def run(size: int) -> None:
        latents = torch.zeros(size, model.unet.config["in_channels"], side, side, device=model.device)
        model.predict(latents, 0, embedding.expand(size, -1, -1))
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)

    with _headroom(model.device):
        return find_knee(run, budget=BUDGET_SECONDS)


@contextmanager
def _headroom(device: torch.device) -> Iterator[None]:
    """Inside the block memory runs out early, so that what fits there also fits beside everything else."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
