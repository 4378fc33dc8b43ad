from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffedit_ray.diffusion.kernels import CompiledUNet, compile_options, lay_out
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.errors import ModelError
from tests.diffusion.helpers import HORSE, ZEBRA

LATENT, TEXT = (4, 8, 8), (16, 128)

COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


def batch(model: LatentDiffusionModel, count: int, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    texts = model.embed_prompts([HORSE, ZEBRA])[torch.arange(count) % 2]
    return torch.randn(count, 4, side, side, generator=generator), torch.arange(count) * 7 + 1, texts


@pytest.fixture(scope="module")
def small_model(tiny_model: LatentDiffusionModel) -> LatentDiffusionModel:
    """With a UNet of one level: tracing, and compiling even more, take time by the number of layers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return dataclasses.replace(tiny_model, unet=unet.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def traced(small_model: LatentDiffusionModel) -> Iterator[CompiledUNet]:
    """Traced and replayed as compiled code is, without the compiler."""
    yield CompiledUNet(small_model.unet, 8, LATENT, TEXT, backend="eager")
    torch.compiler.reset()


@pytest.fixture(scope="module")
def traced_for_two(small_model: LatentDiffusionModel) -> Iterator[CompiledUNet]:
    """The same for a batch that two threads divide between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield CompiledUNet(small_model.unet, 32, LATENT, TEXT, backend="eager")
    torch.set_num_threads(before)
    torch.compiler.reset()


def test_convolution_weights_lie_channels_last_on_cpus_and_gpus(tiny_model: LatentDiffusionModel) -> None:
    for network in (tiny_model.unet, tiny_model.vae.encoder, tiny_model.vae.decoder):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for device, moved in (("cuda", True), ("cpu", True), ("mps", False)):
        convolution = torch.nn.Conv2d(8, 8, 3)
        lay_out(convolution, torch.device(device))
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last) == moved


def test_layout_changes_nothing_but_rounding(tiny_model: LatentDiffusionModel) -> None:
    plain = copy.deepcopy(tiny_model)
    for network in (plain.unet, plain.vae):
        network.to(memory_format=torch.contiguous_format)
    x, _, texts = batch(tiny_model, 3)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(tiny_model.predict(x, 481, texts), plain.predict(x, 481, texts), **close)
    torch.testing.assert_close(tiny_model.encode_images(pixels), plain.encode_images(pixels), **close)
    torch.testing.assert_close(tiny_model.decode_latents(x), plain.decode_latents(x), **close)


FREED = """
import ctypes, json, platform, resource, sys, torch
from diffedit_ray.diffusion.kernels import keep_freed_memory

class Malloc(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f uord ford keep".split()]

def mapped():
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc
    return mallinfo().hblkhd

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(6 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2"):
    keeps = sys.argv[1] == "kept" and keep_freed_memory()
    before = mapped()
    tensor = torch.ones(6 << 20)
    fresh = mapped() - before
    del tensor
    print(json.dumps([keeps, fresh, min(faults() for _ in range(5))]))
"""


def test_tensors_use_the_memory_that_others_have_freed() -> None:
    def found(how: str) -> Any:
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, check=True, text=True)
        return json.loads(done.stdout or "null")

    plain, kept = found("plain"), found("kept")
    if plain is None:
        pytest.skip("another C library than glibc")
    # what is mapped for one tensor goes back to the system with it
    assert plain[:2] == [False, pytest.approx(6 << 22, rel=0.01)]
    assert kept[:2] == [True, 0]
    assert kept[2] < 100  # of 25,000 pages


def test_tensors_come_out_as_they_went_in(tiny_model: LatentDiffusionModel) -> None:
    x, _, texts = batch(tiny_model, 2)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert tiny_model.predict(given, 481, texts).is_contiguous()
        assert tiny_model.decode_latents(given).is_contiguous()


def test_attention_is_torchs_fused_one(tiny_model: LatentDiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(query.shape)
        return fused(query, *args, **kwargs)  # type: ignore[arg-type]

    x, _, texts = batch(tiny_model, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    tiny_model.predict(x, 481, texts)
    assert len(calls) == len(tiny_model.unet.attn_processors)


@pytest.mark.parametrize(("count", "compiled"), [(1, False), (2, True), (3, False), (4, True), (8, True), (9, False)])
def test_some_sizes_are_compiled_and_all_are_right(
    traced: CompiledUNet, small_model: LatentDiffusionModel, count: int, compiled: bool
) -> None:
    assert traced.sizes == [2, 4, 8]
    x, times, texts = batch(small_model, count)
    assert traced.compiled_for(x, texts) == compiled
    with torch.inference_mode():
        expected = small_model.unet(x, times, texts).sample
    torch.testing.assert_close(traced(x, times, texts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "most", "calls"),
    [(8, 8, [8]), (21, 8, [8, 8, 4, 1]), (7, 8, [4, 2, 1]), (9, 5, [4, 4, 1]), (3, 1, [1, 1, 1]), (0, 8, [])],
)
def test_latents_go_in_calls_of_compiled_sizes(traced: CompiledUNet, samples: int, most: int, calls: list[int]) -> None:
    assert traced.split(samples, most) == calls


def test_a_size_is_divided_among_the_cores(traced_for_two: CompiledUNet, small_model: LatentDiffusionModel) -> None:
    assert traced_for_two.sizes == [8, 16, 32]
    calls: list[tuple[str, int]] = []
    handle = traced_for_two.module.register_forward_hook(
        lambda _module, args, _output: calls.append((threading.current_thread().name[:5], len(args[0])))
    )
    for count, expected in ((16, [("cores", 8)] * 2), (12, [])):
        calls.clear()
        x, times, texts = batch(small_model, count)
        with torch.inference_mode():
            plain = small_model.unet(x, times, texts).sample
        torch.testing.assert_close(traced_for_two(x, times, texts), plain, rtol=1e-5, atol=1e-5)
        assert calls == expected
    handle.remove()


@pytest.mark.parametrize("threads", ["one", "two"])
def test_nothing_is_compiled_after_the_start(
    request: pytest.FixtureRequest, small_model: LatentDiffusionModel, threads: str
) -> None:
    compiled = request.getfixturevalue("traced" if threads == "one" else "traced_for_two")
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (1, 2, 5, 8, 16, 20, 32):
            x, times, texts = batch(small_model, count)
            compiled(x.to(memory_format=torch.channels_last), times, texts[:1].expand(count, -1, -1))
        x, times, texts = batch(small_model, 8, side=16)
        assert not compiled.compiled_for(x, texts)
        assert compiled(x, times, texts).shape == (8, 4, 16, 16)


def test_a_compiler_that_fails_is_a_model_error_that_names_the_way_out(small_model: LatentDiffusionModel) -> None:
    with pytest.raises(ModelError, match=r"Invalid backend.*without --compile"):
        CompiledUNet(small_model.unet, 8, LATENT, TEXT, backend="no-such-compiler")


def test_graphs_on_gpus_and_packed_weights_on_cpus(small_model: LatentDiffusionModel) -> None:
    assert compile_options(torch.device("cuda", 1)) == {"mode": "max-autotune"}
    assert torch._inductor.list_mode_options()["max-autotune"]["triton.cudagraphs"]
    options = compile_options(torch.device("cpu"))["options"]
    assert options["freezing"]
    assert set(options) <= set(torch._inductor.list_options())


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler with Python's headers here")
def test_compiled_predictions_are_the_plain_ones_and_outlast_the_next_call(small_model: LatentDiffusionModel) -> None:
    compiled = dataclasses.replace(small_model)
    compiled.compile(1)
    x, _, texts = batch(small_model, 1)
    output = compiled.predict(x, 481, texts)
    torch.testing.assert_close(output, small_model.predict(x, 481, texts), rtol=1e-4, atol=1e-5)
    kept = output.clone()
    assert not torch.equal(compiled.predict(-x, 481, texts), kept)
    assert torch.equal(output, kept)
