"""A batch on a CPU's cores side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

LEAST_SAMPLES = 8
"""Samples a core must get: with fewer, its matrix products are too small to be fast."""


class Cores:
    """Calls a network on parts of a batch at the same time, each part on cores of its own.

    Torch by itself has all cores work on one layer and wait for each other after it; here each goes through the whole
    network alone.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._shape = (0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cores:
        return Cores()  # threads cannot be copied, and a copy finds its own

    def parts(self, samples: int, least: int = LEAST_SAMPLES) -> int:
        """Into how many parts a batch goes: a power of two, so that even parts of a power of two are powers of two.

        Args:
            samples: Of the batch.
            least: What a part must have.
        """
        most = min(torch.get_num_threads(), samples // least)
        return 1 << (most.bit_length() - 1) if most > 1 else 1

    def __call__(self, network: Callable[..., Tensor], *batch: Tensor, weight: int = 1) -> Tensor:
        """``network(*batch)``, for a network that treats every sample by itself.

        Args:
            network: Takes parts of `batch`.
            batch: Tensors of the same length.
            weight: Samples that each of `batch` becomes.
        """
        samples = len(batch[0]) * min(weight, LEAST_SAMPLES)
        parts = self.parts(samples) if batch[0].device.type == "cpu" else 1
        pieces = zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)
        return torch.cat(self.map(network, pieces, parts))

    def map(self, network: Callable[..., Tensor], pieces: Iterable[tuple[Tensor, ...]], parts: int) -> list[Tensor]:
        """``[network(*piece) for piece in pieces]``, `parts` of them at a time.

        Args:
            network: Called without gradients, by `parts` threads which have torch's threads divided among them.
            pieces: Batches.
            parts: 1 is this thread, with all of torch's.
        """
        if parts == 1:
            return [_infer(network, piece) for piece in pieces]
        pool = self._workers(parts)
        futures = [pool.submit(_infer, network, piece) for piece in pieces]
        return [future.result() for future in futures]

    def _workers(self, parts: int) -> ThreadPoolExecutor:
        threads = torch.get_num_threads()
        shape = (parts, max(1, threads // parts))
        if self._pool is None or shape != self._shape:
            if self._pool is not None:
                self._pool.shutdown()
            # torch's number of threads is each thread's own, and of threads that are new to it the last that was set
            self._pool = ThreadPoolExecutor(parts, "cores", _use_threads, (shape[1],))
            self._shape = shape
            started = Barrier(parts)
            list(self._pool.map(lambda _: started.wait(), range(parts)))
            torch.set_num_threads(threads)
        return self._pool


def even_calls(samples: int, most: int, parts: int = 1) -> list[int]:
    """Sizes of calls, none above `most`, as even as can be: a full one and a rest of one would cost nearly two.

    Args:
        samples: Of all calls.
        most: Of one call.
        parts: Equal ones that each call but the last is to be divided in, where `most` allows it.
    """
    unit = parts if parts <= most else 1
    count = max(1, -(-samples // (most // unit * unit)))
    units = samples // unit
    sizes = [unit * (units // count + (i < units % count)) for i in range(count)]
    sizes[-1] += samples % unit
    return [size for size in sizes if size]


def _use_threads(count: int) -> None:
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread's first question would otherwise be answered with what was set last, elsewhere


@torch.inference_mode()
def _infer(network: Callable[..., Tensor], piece: tuple[Tensor, ...]) -> Tensor:
    return network(*piece)
