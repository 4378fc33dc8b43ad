from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion import model as model_module
from diffedit_ray.diffusion.checkpoint import checkpoint_folder, model_geometry, model_revision
from diffedit_ray.diffusion.framing import Geometry
from diffedit_ray.diffusion.layers import NarrowGroupNorm, SplitGEGLU
from diffedit_ray.diffusion.model import LatentDiffusionModel, resolve_device, resolve_dtype
from diffedit_ray.diffusion.schedule import CLEAN
from diffedit_ray.diffusion.winograd import WinogradConv2d, WinogradUpsample2D
from diffedit_ray.errors import ModelError
from tests.diffusion.helpers import HORSE, PEAR, ZEBRA, smooth_image


@pytest.fixture
def copied_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def change_config(folder: Path, part: str, **changes: object) -> None:
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_predict_is_the_unet_of_diffusers(tiny_model: LatentDiffusionModel, tiny_folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = tiny_model.embed_prompts([HORSE, ZEBRA, ""])
    for time in (1, 481, 999):
        with torch.no_grad():
            expected = unet(x, time, encoder_hidden_states=texts).sample
        torch.testing.assert_close(tiny_model.predict(x, time, texts), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny_model.predict(x, 1, texts), tiny_model.predict(x, 481, texts), atol=1e-3)


@pytest.mark.parametrize(("capability", "replaced"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_layers_are_replaced_where_that_has_been_measured(
    monkeypatch: pytest.MonkeyPatch, capability: str, replaced: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    unet = LatentDiffusionModel.load(demo_model(), device="cpu").unet
    for kind in (WinogradConv2d, WinogradUpsample2D, NarrowGroupNorm, SplitGEGLU):
        assert any(isinstance(module, kind) for module in unet.modules()) == replaced


def test_the_clean_image_is_the_networks_first_time(tiny_model: LatentDiffusionModel) -> None:
    x, texts = torch.ones(1, 4, 8, 8), tiny_model.embed_prompts([HORSE])
    assert torch.equal(tiny_model.predict(x, CLEAN, texts), tiny_model.predict(x, 0, texts))


def test_prompts_embed_as_the_stable_diffusion_pipeline_does(
    tiny_model: LatentDiffusionModel, tiny_folder: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    long = "a cat and a dog and a bear and a fox and a lion and a pig and a panda on snow"
    for prompt in (HORSE, PEAR, long):
        positive, negative = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, True)
        torch.testing.assert_close(tiny_model.embed_prompts([prompt]), positive, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiny_model.embed_prompts([""]), negative, rtol=1e-5, atol=1e-5)


def test_images_encode_to_the_mean_times_the_scaling_factor(
    tiny_model: LatentDiffusionModel, tiny_folder: Path
) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae")
    pixels = torch.from_numpy(smooth_image().copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert vae.config.scaling_factor != 1
    x0 = tiny_model.encode_images(pixels)
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny_model.encode_images(pixels), x0)


def test_latents_decode_as_the_vae_does_within_its_range(tiny_model: LatentDiffusionModel) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_model.vae.decode(latents / tiny_model.vae.config.scaling_factor).sample
    torch.testing.assert_close(tiny_model.decode_latents(latents), expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    loud = tiny_model.decode_latents(latents * 1e4)
    assert loud.shape == (2, 3, 32, 32)
    assert (float(loud.min()), float(loud.max())) == (-1, 1)


def test_a_shift_factor_goes_in_and_out_again(copied_folder: Path, tiny_model: LatentDiffusionModel) -> None:
    change_config(copied_folder, "vae/config.json", shift_factor=0.25)
    shifted = LatentDiffusionModel.load(copied_folder, device="cpu")
    pixels = torch.from_numpy(smooth_image().copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    x0 = tiny_model.encode_images(pixels)
    torch.testing.assert_close(shifted.encode_images(pixels), x0 - 0.25 * 0.5)
    torch.testing.assert_close(shifted.decode_latents(x0 - 0.25 * 0.5), tiny_model.decode_latents(x0))


def test_geometry_is_known_with_and_without_the_weights(tiny_model: LatentDiffusionModel, tiny_folder: Path) -> None:
    # 8 cells of 4 pixels, and a UNet that halves once
    assert tiny_model.geometry == model_geometry(str(tiny_folder)) == Geometry(native=32, multiple=8, factor=4)


def test_schedule_comes_from_the_checkpoint(copied_folder: Path) -> None:
    file = "scheduler/scheduler_config.json"
    change_config(copied_folder, file, prediction_type="v_prediction", timestep_spacing="trailing")
    schedule = LatentDiffusionModel.load(copied_folder, device="cpu").schedule
    assert schedule.prediction_type == "v_prediction"
    assert schedule.timesteps(50)[-1] == 999


def test_weights_are_frozen_and_in_evaluation_mode(tiny_model: LatentDiffusionModel) -> None:
    for part in (tiny_model.vae, tiny_model.unet, tiny_model.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_lower_precision_stays_inside_the_networks(tiny_folder: Path, tiny_model: LatentDiffusionModel) -> None:
    half = LatentDiffusionModel.load(tiny_folder, device="cpu", dtype="bfloat16")
    x, texts = torch.ones(1, 4, 8, 8), [HORSE]
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    output = half.predict(x, 481, half.embed_prompts(texts))
    assert output.dtype == half.encode_images(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    expected = tiny_model.predict(x, 481, tiny_model.embed_prompts(texts))
    assert 0 < float((output - expected).norm() / expected.norm()) < 0.05


def test_revision_names_the_weights_and_not_their_place(tiny_folder: Path, copied_folder: Path) -> None:
    revision = model_revision(str(tiny_folder))
    assert len(revision) == 16
    assert int(revision, 16) >= 0
    assert model_revision(str(copied_folder)) == revision
    (copied_folder / "README.md").write_text("not a weight")
    assert model_revision(str(copied_folder)) == revision


def test_revision_changes_with_one_bit_of_a_weight(tiny_folder: Path, copied_folder: Path) -> None:
    file = next((copied_folder / "unet").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_revision(str(copied_folder)) != model_revision(str(tiny_folder))


def test_revision_changes_with_the_noise_schedule(tiny_folder: Path, copied_folder: Path) -> None:
    change_config(copied_folder, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert model_revision(str(copied_folder)) != model_revision(str(tiny_folder))


@pytest.mark.parametrize("part", ["model_index.json", "vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copied_folder: Path, part: str) -> None:
    missing = copied_folder / part
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(ModelError, match=rf"{part} missing"):
        checkpoint_folder(str(copied_folder))


def test_damaged_weights_are_a_model_error_naming_the_folder(copied_folder: Path) -> None:
    file = next((copied_folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=str(copied_folder)):
        LatentDiffusionModel.load(copied_folder, device="cpu")


def test_damaged_configuration_is_a_model_error_naming_the_folder(copied_folder: Path) -> None:
    (copied_folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=str(copied_folder)):
        model_geometry(str(copied_folder))


def test_inpainting_checkpoints_are_refused_with_advice(tiny_folder: Path, copied_folder: Path) -> None:
    unet = UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(tiny_folder / "unet"), "in_channels": 9}
    )
    unet.save_pretrained(copied_folder / "unet")
    with pytest.raises(ModelError, match=r"takes 9 channels and the VAE gives 4.*base model"):
        LatentDiffusionModel.load(copied_folder, device="cpu")


def test_unknown_prediction_is_refused(copied_folder: Path) -> None:
    change_config(copied_folder, "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="'sample'"):
        LatentDiffusionModel.load(copied_folder, device="cpu")


@pytest.mark.parametrize("device", ["toaster", "cpu:oven"])
def test_unknown_devices_are_refused_by_name(device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}'"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_absent_devices_are_refused_and_auto_falls_back() -> None:
    with pytest.raises(ModelError, match="'cuda'"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_a_gpu_is_bfloat16_if_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("limit", ["VAE_PIXELS", "CORE_PIXELS"])
@pytest.mark.parametrize(("pixels", "seen"), [(1, [1, 1, 1]), (32 * 32 * 2, [2, 1]), (32 * 32 * 3, [3])])
def test_the_autoencoder_sees_few_pixels_at_once(
    tiny_model: LatentDiffusionModel, monkeypatch: pytest.MonkeyPatch, limit: str, pixels: int, seen: list[int]
) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = tiny_model.encode_images(images)
    decoded = tiny_model.decode_latents(x0)
    sizes: list[int] = []
    hooks = [
        part.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
        for part in (tiny_model.vae.encoder, tiny_model.vae.decoder)
    ]
    monkeypatch.setattr(model_module, limit, pixels)
    try:
        torch.testing.assert_close(tiny_model.encode_images(images), x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiny_model.decode_latents(x0), decoded, rtol=1e-5, atol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()
    # the cores take turns as they like
    assert sorted(sizes[: len(seen)]) == sorted(sizes[len(seen) :]) == sorted(seen)


def test_auto_precision_on_a_cpu_is_full() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
