"""The embedded model's UNet and text encoder, trained together on cached latents."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffedit_ray.demo.scenes import KINDS, PLACES, caption
from diffedit_ray.demo.training.autoencoder import LATENT_CHANNELS
from diffedit_ray.demo.training.loop import Recipe, TrainingRun, train
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.schedule import add_noise

logger = logging.getLogger(__name__)

MAX_TOKENS = 16
END_OF_WORD = "</w>"
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.12
"""Share of captions replaced by the empty one, for guidance and for ∅."""
PLACE_DROPOUT = 0.08
"""Share of captions that name only the objects, so that "a zebra" works too."""
SNR_LIMIT = 5.0
"""Both ends of the loss weight (`loss_weight`)."""


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """The merges that make one token of every word, most frequent pair first, ties by the alphabet.

    The tokenizers package's own trainer breaks ties by chance, so that two processes of one
    training would number their tokens differently.
    """
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for piece in pieces for pair in itertools.pairwise(piece)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for piece in pieces:
            for i in range(len(piece) - 1, 0, -1):
                if tuple(piece[i - 1 : i + 1]) == best:
                    piece[i - 1 : i + 1] = ["".join(best)]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make one token of every word a caption uses."""
    captions = [caption([kind], place) for kind in KINDS for place in PLACES]
    captions += [caption(["apple", "pear"], place) for place in PLACES]
    merges = byte_pair_merges(" ".join(captions).split())
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.'-"]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {t: i for i, t in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder."""
    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH * 4,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet: plain blocks at 16², cross-attention at 8² and 4²."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def loss_weight(snr: Tensor) -> Tensor:
    """What one latent's squared noise error counts: the error in velocity, with both ends capped.

    Velocity weighs ε's error by 1 + 1/SNR (Salimans & Ho 2022, arXiv 2202.00512, section 4), which
    counts the noisy steps, where an object's shape is decided, as much as the clean ones. Little
    noise counts as Min-SNR has it (Hang et al. 2023, arXiv 2303.09556), and pure noise, where
    there is little to learn, no more than SNR 1/5.
    """
    velocity = 1 + 1 / snr.clamp(min=1 / SNR_LIMIT)
    return velocity * snr.clamp(max=SNR_LIMIT) / snr


def tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(N, MAX_TOKENS) token ids, padded as Stable Diffusion pads."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def train_denoiser(
    latents: Tensor,
    scenes: Sequence[tuple[tuple[str, ...], str]],
    run: TrainingRun,
    *,
    steps: int,
    batch: int,
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Train UNet and text encoder to predict the noise in `latents` under their captions.

    Args:
        latents: (N, 16, 16, 16), scaled.
        scenes: Per latent its object kinds and background.
        run: Where and from which seed.
        steps: Optimiser steps.
        batch: Latents a step.
    """
    device = run.device
    torch.manual_seed(run.seed + 1)
    trained = None if run.warm_start is None else LatentDiffusionModel.load(run.warm_start, device="cpu")
    tokenizer = build_tokenizer() if trained is None else trained.tokenizer
    network = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    if trained is not None:
        network["unet"].load_state_dict(trained.unet.state_dict())
        network["text_encoder"].load_state_dict(trained.text_encoder.state_dict())
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet, text_encoder = network["unet"], network["text_encoder"]
    full = tokenise(tokenizer, [caption(kinds, place) for kinds, place in scenes])
    short = tokenise(tokenizer, [caption(kinds, place).removesuffix(" " + PLACES[place]) for kinds, place in scenes])
    empty = tokenise(tokenizer, [""])
    alphas = build_scheduler().alphas_cumprod
    held = slice(0, 256)

    def noisy(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return add_noise(x, noise, alphas[t][:, None, None, None])

    def step(index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        rows = torch.randint(held.stop, len(latents), (batch,), generator=generator)
        t = torch.randint(len(alphas), (batch,), generator=generator)
        luck = torch.rand(batch, 1, generator=generator)
        ids = torch.where(luck < CAPTION_DROPOUT, empty, full[rows])
        ids = torch.where(luck > 1 - PLACE_DROPOUT, short[rows], ids)
        x = latents[rows].float()
        noise = torch.randn(x.shape, generator=generator)
        context = text_encoder(ids.to(device))[0]
        predicted = unet(noisy(x, t, noise).to(device), t.to(device), context).sample
        error = (predicted - noise.to(device)).square().mean((1, 2, 3))
        snr = alphas[t] / (1 - alphas[t])
        return {"loss": (loss_weight(snr).to(device) * error).mean(), "error": error.mean()}

    def report(index: int) -> None:
        generator = torch.Generator().manual_seed(run.seed)
        x = latents[held].float()[:128]
        noise = torch.randn(x.shape, generator=generator)
        shown = []
        for when in (200, 480, 780):
            t = torch.full((len(x),), when)
            context = text_encoder(full[held][:128].to(device))[0]
            predicted = unet(noisy(x, t, noise).to(device), t.to(device), context).sample
            shown.append(f"{float((predicted.cpu() - noise).square().mean()):.4f}")
        logger.info("denoiser: step %d held-out error at t=200, 480, 780: %s", index, " ".join(shown))

    recipe = Recipe(steps=steps, learning_rate=1e-3, warmup=200, ema=0.9985, weight_decay=1e-3)
    train("denoiser", network, step, recipe, replace(run, seed=run.seed + 1), on_checkpoint=report)
    return unet, text_encoder, tokenizer
