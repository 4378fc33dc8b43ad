from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffedit_ray.diffusion.cores import Cores, even_calls
from diffedit_ray.diffusion.model import LatentDiffusionModel


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "samples", "parts"),
    [(1, 64, 1), (2, 15, 1), (2, 16, 2), (2, 64, 2), (3, 64, 2), (8, 24, 2), (8, 64, 8), (16, 32, 4), (6, 64, 4)],
)
def test_parts_are_a_power_of_two_and_none_is_small(threads: int, samples: int, parts: int) -> None:
    torch.set_num_threads(threads)
    assert Cores().parts(samples) == parts


def test_each_part_has_a_thread_and_its_share_of_torchs() -> None:
    seen: list[tuple[str, int, int]] = []

    def network(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((threading.current_thread().name, torch.get_num_threads(), len(x)))
        return x + y

    cores, x = Cores(), torch.arange(17.0)
    assert torch.equal(cores(network, x, 2 * x), 3 * x)
    assert sorted(n for _, _, n in seen) == [8, 9]
    assert {threads for _, threads, _ in seen} == {1}
    assert all(name.startswith("cores") for name, _, _ in seen)
    assert torch.get_num_threads() == 2
    cores(network, x[:9], x[:9])
    assert seen[-1] == (threading.current_thread().name, 2, 9)


def test_samples_that_become_several_count_as_many() -> None:
    seen: list[tuple[int, int]] = []

    def network(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((len(x), len(y)))
        return y.flatten(0, 1)

    y = torch.arange(24.0).view(4, 6)
    assert torch.equal(Cores()(network, torch.zeros(4), y, weight=6), torch.arange(24.0))
    assert seen == [(2, 2), (2, 2)]
    # one sample is one part, whatever it becomes
    assert torch.equal(Cores()(network, torch.zeros(1), y[:1], weight=99), y[0])
    assert seen[2:] == [(1, 1)]


@pytest.mark.parametrize(
    ("samples", "most", "parts", "sizes"),
    [
        (50, 64, 1, [50]),
        (65, 64, 1, [33, 32]),
        (0, 64, 2, []),
        (50, 32, 2, [26, 24]),
        (51, 32, 2, [26, 25]),
        (42, 21, 2, [14, 14, 14]),  # two calls of 21 would each leave a core waiting
        (9, 1, 2, [1] * 9),
        (3, 10, 8, [3]),
        (100, 24, 8, [24, 24, 16, 16, 20]),
    ],
)
def test_calls_are_even_and_so_are_their_parts(samples: int, most: int, parts: int, sizes: list[int]) -> None:
    assert even_calls(samples, most, parts) == sizes


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_no_call_is_above_the_most(parts: int) -> None:
    for samples in range(1, 80):
        for most in range(1, 40):
            sizes = even_calls(samples, most, parts)
            assert sum(sizes) == samples
            assert 0 < min(sizes) <= max(sizes) <= most


def test_a_thread_that_begins_later_has_all_of_torchs_threads() -> None:
    cores, x = Cores(), torch.zeros(16)
    cores(lambda part: part, x)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 2
        assert other.submit(cores.parts, 16).result() == 2
    assert torch.get_num_threads() == 2


def test_what_a_part_raises_is_raised() -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"of {len(x)}")

    with pytest.raises(torch.OutOfMemoryError, match="of 8"):
        Cores()(network, torch.zeros(16))


def test_predictions_are_those_of_one_call(tiny_model: LatentDiffusionModel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(17, 4, 8, 8, generator=generator)
    times = torch.arange(17) * 50
    texts = tiny_model.embed_prompts([f"a cat {i}" for i in range(17)])
    with torch.inference_mode():
        expected = tiny_model.unet(x, times, texts).sample
    torch.testing.assert_close(tiny_model.predict(x, times, texts), expected, rtol=1e-4, atol=1e-5)
    decoded = tiny_model.decode_latents(x)
    torch.testing.assert_close(decoded[12:], tiny_model.decode_latents(x[12:]), rtol=1e-4, atol=1e-4)


def test_a_model_that_has_worked_can_be_copied(tiny_model: LatentDiffusionModel) -> None:
    x, texts = torch.zeros(16, 4, 8, 8), tiny_model.embed_prompts([""]).expand(16, -1, -1)
    expected = tiny_model.predict(x, 481, texts)
    torch.testing.assert_close(copy.deepcopy(tiny_model).predict(x, 481, texts), expected)
