from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from diffedit_ray.demo import demo_model
from diffedit_ray.demo.scenes import KINDS, PLACES, caption
from diffedit_ray.demo.training.autoencoder import linear_autoencoder, reconstruction_psnr
from diffedit_ray.demo.training.denoiser import build_tokenizer, byte_pair_merges, loss_weight
from diffedit_ray.demo.training.loop import Recipe, TrainingRun, train


class _KilledError(Exception):
    """Stands for a kill between two steps."""


def _fit_line(workdir: Path, seed: int = 0, kill_at: int | None = None) -> Tensor:
    torch.manual_seed(seed)
    network = nn.Linear(3, 1)

    def step(index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        if index == kill_at:
            raise _KilledError
        x = torch.randn(8, 3, generator=generator)
        return {"loss": F.mse_loss(network(x), x.sum(1, keepdim=True))}

    recipe = Recipe(steps=60, learning_rate=0.05, warmup=5, ema=0.9)
    train("line", network, step, recipe, TrainingRun(workdir, seed, torch.device("cpu")), checkpoint_seconds=0)
    return network.weight.detach().clone()


def test_killed_training_ends_where_unbroken_training_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = _fit_line(tmp_path / "a")
    with pytest.raises(_KilledError):
        _fit_line(tmp_path / "b", kill_at=23)
    resumed = _fit_line(tmp_path / "b")
    assert torch.equal(whole, resumed)
    assert torch.allclose(whole, torch.ones(1, 3), atol=0.1)


def test_seed_decides_training(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert not torch.equal(_fit_line(tmp_path / "a", seed=1), _fit_line(tmp_path / "b", seed=2))


def test_loss_weight_is_the_velocity_error_between_its_caps() -> None:
    snr = torch.tensor([1e-3, 0.2, 1.0, 5.0, 100.0])
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    x, noise, error = torch.randn(5), torch.randn(5), torch.randn(5)
    z = alpha * x + sigma * noise
    # the x and v that go with a wrong ε for the same z
    wrong_x = (z - sigma * (noise + error)) / alpha
    v, wrong_v = alpha * noise - sigma * x, alpha * (noise + error) - sigma * wrong_x
    ratio = (wrong_v - v).square() / error.square()
    torch.testing.assert_close(loss_weight(snr)[1:4], ratio[1:4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss_weight(snr)[[0, 4]], torch.tensor([6.0, 1.01 * 5 / 100]))


def test_encoder_is_the_linear_code() -> None:
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(24, 3, 16, 16) * 2 - 1, size=128, mode="bicubic").clamp(-1, 1)
    vae, code = linear_autoencoder(smooth)
    with torch.no_grad():
        latents = vae.encode(smooth[:4]).latent_dist.mean
        wanted = code(smooth[:4])
        rebuilt = vae.decode(latents).sample
    assert (latents - wanted).square().mean() < 1e-4 * wanted.var()
    grey = reconstruction_psnr(smooth[:4].mean((2, 3), keepdim=True).expand_as(smooth[:4]), smooth[:4]).mean()
    assert reconstruction_psnr(rebuilt, smooth[:4]).mean() > grey + 5


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for kind in KINDS:
        for place in PLACES:
            text = caption([kind], place)
            assert len(tokenizer.tokenize(text)) == len(text.split())


def test_every_process_numbers_tokens_alike() -> None:
    program = (
        "from diffedit_ray.demo.training.denoiser import build_tokenizer as t; print(sorted(t().get_vocab().items()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(sorted(build_tokenizer().get_vocab().items()))


def test_merges_go_by_frequency_then_by_the_alphabet() -> None:
    assert byte_pair_merges(["aba", "ab"]) == [("b", "a</w>"), ("a", "ba</w>"), ("a", "b</w>")]
    assert byte_pair_merges(["pepper", "pear", "a"])[0] == ("p", "e")


def test_shipped_checkpoint_is_an_ordinary_one() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(demo_model())
    image = pipeline("a horse on grass", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert sum(file.stat().st_size for file in demo_model().rglob("*") if file.is_file()) <= 45e6
