"""How the editor cuts its batches: when memory runs out, and when a row's bytes must not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.result import EditResult
from tests.diffusion.helpers import HORSE, PEAR, SHORT, ZEBRA, smooth_image, watched

QUERIES = [ZEBRA, PEAR, ZEBRA, PEAR, HORSE]  # the last asks for nothing


def edit(editor: DiffEditor, rows: list[int]) -> EditResult:
    images = [smooth_image(seed=i) for i in rows]
    return editor.edit(images, [HORSE] * len(rows), [QUERIES[i] for i in rows], rows)


@contextmanager
def memory_for(module: torch.nn.Module, samples: int) -> Iterator[list[int]]:
    """Inside the block `module` has memory for so many samples at once; yields the sizes it was asked for."""
    asked: list[int] = []

    def check(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        asked.append(len(args[-1]))  # the last of a UNet's are the embeddings
        if asked[-1] > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = module.register_forward_pre_hook(check)
    try:
        yield asked
    finally:
        handle.remove()


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(tiny_model: LatentDiffusionModel) -> None:
    wanted = edit(DiffEditor(tiny_model, SHORT), [0, 1, 2, 3, 4])
    editor = DiffEditor(tiny_model, SHORT)
    with memory_for(tiny_model.vae.encoder, 2) as asked:
        got = edit(editor, [0, 1, 2, 3, 4])
    assert asked == [5, 2, 2, 1]
    assert editor.batch_limit == 2
    assert got.unchanged == [False, False, False, False, True]
    for a, b in zip(got.images, wanted.images, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(got.masks, wanted.masks, strict=True))
    with memory_for(tiny_model.vae.encoder, 2) as asked:
        edit(editor, [0, 1, 2])
    assert asked == [2, 1]


def test_what_fits_before_memory_runs_out_is_not_done_again(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model, SHORT)
    editor.batch_limit = 4
    with memory_for(tiny_model.vae.decoder, 3) as decoded:
        edit(editor, [4, 0, 1, 2, 0, 1, 2, 3])  # three to decode in the first four, four in the next
    assert decoded == [3, 4, 2, 2]


def test_one_row_alone_gets_smaller_unet_calls(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model, SHORT)
    with memory_for(tiny_model.unet, 1) as asked:
        result = edit(editor, [0])
    assert not result.unchanged[0]
    assert editor.estimate.unet_batch == 1
    assert set(asked[10:]) == {1}


def test_a_row_that_never_fits_raises(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model, SHORT)
    with memory_for(tiny_model.unet, 0), pytest.raises(torch.OutOfMemoryError):
        edit(editor, [0, 1])


@pytest.mark.parametrize("rows", [[0], [3], [4, 2], [1, 0, 3], [3, 2, 1, 0]])
def test_reproducible_bytes_do_not_depend_on_the_batch(tiny_model: LatentDiffusionModel, rows: list[int]) -> None:
    editor = DiffEditor(tiny_model, SHORT, unet_batch=6, reproducible=True)
    whole = edit(editor, [0, 1, 2, 3, 4])
    part = edit(editor, rows)
    for i, row in enumerate(rows):
        assert np.array_equal(part.images[i], whole.images[row])
        assert np.array_equal(part.contrasts[i], whole.contrasts[row])


def test_reproducible_batches_are_of_one_size(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model, SHORT, unet_batch=6, reproducible=True)
    with watched(tiny_model.unet) as seen:
        edit(editor, [0, 1, 2])
    assert {len(x) for x in seen.latents} == {8}
