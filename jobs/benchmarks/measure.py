"""Time, network evaluations and memory of something that is run."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Measure:
    """What one contestant took.

    Attributes:
        rows: Edits of one repeat.
        edits_per_second: Of each repeat.
        samples: For each watched network, the samples it gave a row: a call on a batch of 4 is 4.
        peak_mib: Most memory held above what was held before, in MiB, in any repeat; None where that cannot be
            measured.
    """

    rows: int
    edits_per_second: list[float] = field(default_factory=list)
    samples: dict[str, float] = field(default_factory=dict)
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        """Of the repeats, in edits a second."""
        return statistics.median(self.edits_per_second)


@contextmanager
def counted(networks: Mapping[str, Sequence[nn.Module]]) -> Iterator[dict[str, int]]:
    """The samples that the modules of each of `networks` give back inside the block."""
    seen = dict.fromkeys(networks, 0)
    calls: list[tuple[str, int]] = []  # which threads may append to at the same time

    def watch(name: str, network: nn.Module) -> Any:
        def count(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            # what comes out: a UNet may be given one latent for many texts
            calls.append((name, len(output if isinstance(output, Tensor) else output[0])))

        return network.register_forward_hook(count)

    handles = [watch(name, network) for name, copies in networks.items() for network in copies]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, samples in calls:
            seen[name] += samples


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Appends the wall-clock seconds of the block, its work on an accelerator included."""
    spent: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield spent
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent.append(time.perf_counter() - began)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """Appends the most MiB the block held above what was held before it.

    On CUDA this is the allocator's own count. Elsewhere it is the process's resident memory, of which Linux alone
    can forget an earlier peak; on other systems it is None.
    """
    found: list[float | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    known = _forget_peak()
    base = _resident("VmRSS") if known else 0.0
    yield found
    found.append(max(0.0, _resident("VmHWM") - base) if known else None)


def _forget_peak() -> bool:
    """Give freed memory back and set the process's peak to what it holds now; whether that worked."""
    try:
        # what an earlier contestant has freed would otherwise be there for the next one to use unseen
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


@dataclass(frozen=True)
class Contestant:
    """One way of editing the same rows.

    Attributes:
        name: What tables and charts call it.
        rows: How many rows `run` edits.
        run: Edits them.
    """

    name: str
    rows: int
    run: Callable[[], Any]


def compare(
    contestants: Mapping[str, Contestant],
    networks: Mapping[str, Sequence[nn.Module]],
    device: torch.device,
    repeats: int,
) -> dict[str, Measure]:
    """Time every contestant `repeats` times, interleaved, in turns that alternate who goes first.

    Args:
        contestants: By key.
        networks: Whose samples are counted, by name.
        device: Where they run.
        repeats: At least one.
    """
    measures = {key: Measure(c.rows) for key, c in contestants.items()}
    for repeat in range(repeats):
        for key in list(contestants)[:: 1 if repeat % 2 == 0 else -1]:
            contestant, measure = contestants[key], measures[key]
            with counted(networks) as seen, peak_memory(device) as peak, timed(device) as spent:
                contestant.run()
            rate = contestant.rows / spent[0]
            measure.edits_per_second.append(rate)
            measure.samples = {name: count / contestant.rows for name, count in seen.items()}
            if peak[0] is not None:
                measure.peak_mib = max(peak[0], measure.peak_mib or 0.0)
            print(f"repeat {repeat + 1} of {repeats}: {contestant.name}: {rate:.3f} edits/s", file=sys.stderr)
    return measures
