from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffedit_ray.diffusion.estimator import Estimator
from diffedit_ray.diffusion.model import LatentDiffusionModel
from tests.diffusion.helpers import watched

pytestmark = pytest.mark.usefixtures("one_thread")  # calls are those of the estimator, not of cores


def latents(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(count))


def texts_for(counts: Sequence[int]) -> list[list[str]]:
    return [[f"thing {i} {j}" if j else "" for j in range(count)] for i, count in enumerate(counts)]


def alone(model: LatentDiffusionModel, x: Tensor, times: Sequence[int], texts: Sequence[Sequence[str]]) -> Tensor:
    return torch.cat(
        [
            model.predict(latent[None], time, model.embed_prompts([text]))
            for latent, time, own in zip(x, times, texts, strict=True)
            for text in own
        ]
    )


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("unet_batch", [1, 5, 64])
@pytest.mark.parametrize("counts", [[1], [2, 2, 2], [1, 3, 0, 2, 11, 1], [20]], ids=str)
def test_estimates_come_in_the_order_of_latents_and_of_their_texts(
    tiny_model: LatentDiffusionModel, counts: list[int], unet_batch: int, reproducible: bool
) -> None:
    x, times, texts = latents(len(counts)), [100 * i + 1 for i in range(len(counts))], texts_for(counts)
    estimates = Estimator(tiny_model, unet_batch, reproducible)(x, times, texts)
    torch.testing.assert_close(estimates, alone(tiny_model, x, times, texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "calls"),
    [
        ([2] * 10, [(10, 20)]),
        ([2] * 40, [(20, 40), (20, 40)]),
        ([1] * 20 + [2] * 10, [(20, 20), (10, 20)]),
        ([1] * 20 + [2] * 7, [(34, 34)]),  # fourteen are too few for a call of their own
        ([2] * 7, [(7, 14)]),  # but not alone
        ([11] * 10, [(5, 40), (5, 40), (10, 30)]),  # eight texts, in even calls, and three
    ],
    ids=str,
)
def test_latents_with_as_many_texts_share_calls(
    tiny_model: LatentDiffusionModel, counts: list[int], calls: list[tuple[int, int]]
) -> None:
    seen: list[tuple[int, int]] = []
    handle = tiny_model.unet.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), len(args[-1]))))
    try:
        Estimator(tiny_model, 64)(latents(len(counts)), [1] * len(counts), texts_for(counts))
    finally:
        handle.remove()
    assert seen == calls


def test_reproducible_calls_are_of_one_size_and_share_nothing(tiny_model: LatentDiffusionModel) -> None:
    with watched(tiny_model.unet) as seen:
        Estimator(tiny_model, 6, reproducible=True)(latents(3), [1, 2, 3], texts_for([2, 5, 4]))
    assert [len(x) for x in seen.outputs] == [8, 8]
