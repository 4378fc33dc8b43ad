"""How a network's arithmetic is laid out and compiled: the same numbers but for rounding, sooner."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from diffedit_ray.diffusion.cores import Cores
from diffedit_ray.errors import ModelError


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Put a network's convolution weights where `device` reads them fastest."""
    if device.type in ("cpu", "cuda"):  # nobody has measured the others
        # oneDNN and cuDNN work on channels-last inside and would rearrange every activation on its way in and out
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors free for the next ones; for the whole process, where it is glibc.

    One call of the network allocates and frees gigabytes in tensors of megabytes. glibc gives them back to the system
    at once, which then has to clear every page of the next ones: a tenth of the time of two cores.

    Returns:
        Whether it will.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows manage memory in other ways
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # glibc before 2.35 takes no more than half of one of its heaps for the second
    mapped = mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)
    return bool(mallopt(trim_threshold, (1 << 31) - 1) and mapped)


def compile_options(device: torch.device) -> dict[str, Any]:
    """What `torch.compile` is told on `device`."""
    if device.type == "cuda":
        return {"mode": "max-autotune"}  # which includes CUDA graphs
    # weights are packed once, for the kernels that will read them; a wrapper in C++ lets other threads run meanwhile,
    # where Python's would make the cores wait for each other
    return {"options": {"freezing": True, "cpp_wrapper": True}}


class Turnstile:
    """Lets one thread at a time choose compiled code, and any number run it.

    Dynamo chooses by guards that keep notes while they are checked: two threads among them see each other's, and
    either may find that nothing fits and compile again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = threading.local()

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Around a call of compiled code; the code itself ends the turn."""
        self._lock.acquire()
        self._inside.held = True
        try:
            yield
        finally:
            self._leave()  # what has to be compiled first may fail before there is code to run

    def _leave(self) -> None:
        if getattr(self._inside, "held", False):
            self._inside.held = False
            self._lock.release()

    def backend(self, name: str, **options: Any) -> Callable[[Any, Any], Callable[..., Any]]:
        """The backend of that name, making code that leaves the turnstile when it begins."""

        def compile_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
            code = lookup_backend(name)(graph, inputs, **options)

            def run(*args: Any) -> Any:
                self._leave()
                return code(*args)

            return run

        return compile_graph


class CompiledUNet:
    """A UNet compiled for a few batch sizes of one shape; all other batches run uncompiled.

    Compiling takes a minute or more a size, so nothing is ever compiled in the middle of a run.

    Args:
        unet: The network, with its weights in place.
        batch: The largest batch it is compiled for; the others are its half and its quarter.
        latent: (C, h, w).
        text: (tokens, width).
        cores: Among which batches are divided on a CPU.
        backend: What `torch.compile` calls to make code of the graph.

    Raises:
        ModelError: The compiler is missing or fails.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        batch: int,
        latent: tuple[int, ...],
        text: tuple[int, ...],
        *,
        cores: Cores | None = None,
        backend: str = "inductor",
    ) -> None:
        self.unet: Any = unet
        self._cores = cores or Cores()
        self._shapes = (latent, text)
        self._parts = self._cores.parts(batch) if unet.device.type == "cpu" else 1
        share = batch // self._parts
        shares = {size for size in (share, share // 2, share // 4) if size}
        self.sizes = sorted(self._parts * size for size in shares)
        self._turnstile = Turnstile()
        options = compile_options(unet.device) if backend == "inductor" else {}
        try:
            chosen: Any = backend
            if self._parts > 1:
                patches = {"config_patches": options.pop("options")} if options else {}
                chosen = self._turnstile.backend(backend, **patches)
            self._compiled: Any = torch.compile(unet, dynamic=False, backend=chosen, **options)
            self._inputs = {size: self._warmed(size) for size in shares}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's stack raises many unrelated types
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise ModelError(f"the UNet cannot be compiled ({lines[0]}); run without --compile") from error

    @torch.inference_mode()
    def _warmed(self, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each part the tensors it is copied into: code is compiled for their strides and flags as well."""
        device, dtype = self.unet.device, self.unet.dtype
        latent, text = self._shapes
        inputs = [
            (
                torch.zeros(size, *latent, device=device, dtype=dtype),
                torch.zeros(size, device=device, dtype=torch.long),
                torch.zeros(size, *text, device=device, dtype=dtype),
            )
            for _ in range(self._parts)
        ]
        for _ in range(3):  # CUDA graphs are recorded on the second call and replayed from the third
            # one after the other, on the thread that will call it: code is compiled for a thread's settings, too
            for held in inputs:
                self._cores.map(self._sample, [held], self._parts)
        return inputs

    def _sample(self, latents: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
        with self._turnstile.choosing():
            return self._compiled(latents, times, embeddings).sample  # type: ignore[no-any-return]

    @property
    def module(self) -> nn.Module:
        """The compiled network."""
        return self._compiled  # type: ignore[no-any-return]

    def split(self, samples: int, most: int) -> list[int]:
        """The sizes of calls that `samples` latents go in: as many as possible of those that are compiled.

        Args:
            samples: How many there are.
            most: The largest call allowed.
        """
        calls = []
        for size in (size for size in reversed(self.sizes) if size <= most):
            calls += [size] * (samples // size)
            samples %= size
        while samples:
            calls.append(min(samples, most))
            samples -= calls[-1]
        return calls

    def compiled_for(self, latents: Tensor, embeddings: Tensor) -> bool:
        """Whether this batch runs compiled."""
        return len(latents) in self.sizes and (latents.shape[1:], embeddings.shape[1:]) == self._shapes

    @torch.inference_mode()
    def __call__(self, latents: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
        """(B, C, h, w), (B,) int64, (B, tokens, width) -> (B, C, h, w), which the next call may overwrite."""
        if not self.compiled_for(latents, embeddings):
            return self._cores(lambda *part: self.unet(*part).sample, latents, times, embeddings)
        inputs = self._inputs[len(latents) // self._parts]
        given = zip(*(tensor.tensor_split(self._parts) for tensor in (latents, times, embeddings)), strict=True)
        for held, part in zip(inputs, given, strict=True):
            for tensor, values in zip(held, part, strict=True):
                tensor.copy_(values)
        outputs = self._cores.map(self._sample, inputs, self._parts)
        return outputs[0] if self._parts == 1 else torch.cat(outputs)
