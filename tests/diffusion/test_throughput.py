from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffedit_ray.diffusion import throughput
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.throughput import find_knee, measure_unet_batch


class Machine:
    """Evaluations that take as long as they are told, on a clock of its own."""

    def __init__(self, seconds: Callable[[int], float], *, fits: int = 1 << 30, choosing: float = 0.0) -> None:
        self.seconds, self.fits, self.choosing = seconds, fits, choosing
        self.now, self.ran = 0.0, list[int]()

    def run(self, size: int) -> None:
        if size > self.fits:
            raise torch.OutOfMemoryError(f"{size} latents")
        if size not in self.ran:
            self.now += self.choosing
        self.ran.append(size)
        self.now += self.seconds(size)

    def clock(self) -> float:
        return self.now


def saturating(full: int) -> Callable[[int], float]:
    """A processor that does up to `full` latents in the time of one, and then one after the other."""
    return lambda size: 0.001 * max(size, full) / full


@pytest.mark.parametrize("full", [1, 2, 8, 16, 64, 256])
def test_the_knee_is_where_doubling_stops_to_pay(full: int) -> None:
    machine = Machine(saturating(full))
    found = find_knee(machine.run, clock=machine.clock)
    assert found.batch == full
    assert found.rates[full] == pytest.approx(1000 * full)
    assert max(machine.ran) == max(found.rates) <= max(32, 4 * full)


def test_small_gains_are_not_worth_their_memory() -> None:
    machine = Machine(lambda size: size / (100 + 2 * (size.bit_length() - 1)))
    found = find_knee(machine.run, budget=1e6, clock=machine.clock)
    assert list(found.rates) == [1, 2, 4, 8, 16, 32]
    assert found.batch == 8  # 106 a second, within 5 % of the 110 of 32, after which it stopped


def test_one_slow_size_does_not_end_the_search() -> None:
    machine = Machine(lambda size: saturating(64)(size) * (2.5 if size == 32 else 1))
    assert find_knee(machine.run, clock=machine.clock).batch == 64


@pytest.mark.parametrize("fits", [1, 2, 16, 63])
def test_memory_ends_the_search_at_what_fits(fits: int) -> None:
    machine = Machine(saturating(1024), fits=fits)
    found = find_knee(machine.run, clock=machine.clock)
    assert found.batch == max(machine.ran) == max(found.rates) == 1 << (fits.bit_length() - 1)


def test_one_latent_that_does_not_fit_is_an_error() -> None:
    machine = Machine(saturating(1), fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        find_knee(machine.run, clock=machine.clock)


def test_choosing_kernels_does_not_count() -> None:
    machine = Machine(saturating(16), choosing=0.05)
    assert find_knee(machine.run, clock=machine.clock).batch == 16


@pytest.mark.parametrize(("each", "largest"), [(0.001, 256), (0.017, 128), (0.1, 32), (3.0, 1), (60.0, 1)])
def test_the_search_ends_in_time(each: float, largest: int) -> None:
    machine = Machine(lambda size: each * size**0.9)  # every doubling pays
    found = find_knee(machine.run, budget=6.0, clock=machine.clock)
    assert found.batch == largest
    assert machine.now <= max(6.0, each)


def test_a_limit_is_kept() -> None:
    machine = Machine(saturating(64))
    assert find_knee(machine.run, limit=8, clock=machine.clock).batch == 8


def test_measuring_runs_the_unet_on_latents_of_its_own_size(
    tiny_model: LatentDiffusionModel, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    shapes: list[torch.Size] = []
    handle = tiny_model.unet.register_forward_hook(lambda _module, args, _output: shapes.append(args[0].shape))
    monkeypatch.setattr(throughput, "BUDGET_SECONDS", 0.5)
    try:
        found = measure_unet_batch(tiny_model)
    finally:
        handle.remove()
    assert {shape[1:] for shape in shapes} == {(4, 8, 8)}
    assert sorted({shape[0] for shape in shapes}) == list(found.rates)
    assert found.batch in found.rates


def test_a_gpu_keeps_memory_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
    device = torch.device("cuda", 1)

    def run_out() -> None:
        with throughput._headroom(device):
            told.append("inside")
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert told == [(0.8, device), "inside", (1.0, device), "empty"]
