"""Where an accelerator's time goes, and what share of its peak that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffedit_ray.diffusion.model import LatentDiffusionModel

PEAK_SECONDS = 2.0
"""How long the peak is looked for."""


def networks(*models: LatentDiffusionModel) -> dict[str, list[nn.Module]]:
    """The parts of some copies of a model whose work is counted; the text encoder's is a thousandth of it."""
    return {
        "unet": [network for model in models for network in model.denoisers],
        "vae_encoder": [model.vae.encoder for model in models],
        "vae_decoder": [model.vae.decoder for model in models],
    }


@torch.no_grad()
def flops_a_sample(model: LatentDiffusionModel) -> dict[str, int]:
    """Floating-point operations of one sample at the model's own size, for each of `networks`.

    A multiply-add is two. Counted on the meta device, so that no device's choice of kernels hides any from the count.
    """
    side, cells = model.geometry.native, model.geometry.native // model.geometry.factor
    with torch.device("meta"):
        unet, vae = (type(part).from_config(part.config) for part in (model.unet, model.vae))
        latents = torch.empty(1, unet.config["in_channels"], cells, cells)
        text = torch.empty(1, model.tokenizer.model_max_length, unet.config["cross_attention_dim"])
        calls: dict[str, Callable[[], Any]] = {
            "unet": lambda: unet(latents, torch.empty(1), text),
            "vae_encoder": lambda: vae.encoder(torch.empty(1, vae.config["in_channels"], side, side)),
            "vae_decoder": lambda: vae.decoder(torch.empty(1, vae.config["latent_channels"], cells, cells)),
        }
        counts = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counts[name] = counter.get_total_flops()
    return counts


def work_a_row(samples: Mapping[str, float], flops: Mapping[str, int]) -> float:
    """Floating-point operations of a row, from the samples each network saw for it."""
    return sum(samples[name] * flops[name] for name in flops)


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = PEAK_SECONDS) -> float:
    """The most that dense square matrix products reach here, in FLOP/s."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls = 20 if device.type == "cuda" else 2
    best = 0.0
    until = time.perf_counter() + seconds
    first = True
    while first or time.perf_counter() < until:
        _synchronise(device)
        began = time.perf_counter()
        for _ in range(calls):
            a @ b
        _synchronise(device)
        # the first product also chooses its kernel and allocates
        best = best if first else max(best, calls * 2 * side**3 / (time.perf_counter() - began))
        until += time.perf_counter() - began if first else 0.0
        first = False
    return best


def top_kernels(run: Callable[[], Any], device: torch.device, count: int = 10) -> list[dict[str, Any]]:
    """What a run spends most of its time in: kernels on CUDA, operators on CPUs.

    Returns:
        Of each its name, milliseconds, calls and its share of the time of all of them.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # the cores' own threads too, which began before
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, acc_events=True, experimental_config=config) as profiler:
        run()
        _synchronise(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    total = sum(spent.values()) or 1.0
    longest = sorted(events, key=lambda e: spent[e.key], reverse=True)[:count]
    return [
        {"name": e.key, "milliseconds": spent[e.key] / 1e3, "calls": e.count, "share": spent[e.key] / total}
        for e in longest
    ]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
