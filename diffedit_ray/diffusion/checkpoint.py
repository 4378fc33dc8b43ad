"""A checkpoint on the disk, without its weights: the driver needs no more, and so never imports torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffedit_ray.diffusion.framing import Geometry
from diffedit_ray.errors import ModelError

_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


def checkpoint_folder(source: str) -> Path:
    """The local folder of a checkpoint: `source` itself, or the hub's snapshot of that id.

    Raises:
        ModelError: No such folder and no such model on the hub, or no checkpoint in it.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["model_index.json", *(f"{part}/*" for part in _PARTS)]
        try:
            # another framework's weights, or a second precision of the same ones, would only cost disk
            ignored = ["*.msgpack", "*.h5", "*.ot", "*.onnx*", "*.bin", "*.ckpt", "*.fp16.*", "*.non_ema.*"]
            folder = Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=ignored))
        except Exception as error:  # the hub client raises many unrelated types
            raise ModelError(
                f"model {source!r} is neither a folder here nor a model the hub would give us "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
            ) from error
    missing = [p for p in ("model_index.json", *_PARTS) if not (folder / p).exists()]
    if missing:
        raise ModelError(
            f"{folder} is not a Stable Diffusion checkpoint in the diffusers format: {', '.join(missing)} missing"
        )
    return folder


def model_revision(source: str) -> str:
    """Names the weights, not the place they lie: 16 hex digits of a hash over the checkpoint's files.

    Raises:
        ModelError: As `checkpoint_folder`.
    """
    folder = checkpoint_folder(source)
    digest = hashlib.sha256()
    for part in ("model_index.json", *_PARTS):
        files = [folder / part] if part.endswith(".json") else sorted((folder / part).rglob("*"))
        for file in files:
            if file.is_file():
                digest.update(f"{file.relative_to(folder).as_posix()}:{file.stat().st_size}\n".encode())
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 22):
                        digest.update(chunk)
    return digest.hexdigest()[:16]


def check_checkpoint(source: str) -> None:
    """Read every part's configuration and the header of every weights file, without loading a tensor.

    Raises:
        ModelError: As `checkpoint_folder`, or a part is damaged, empty or cut short.
    """
    folder = checkpoint_folder(source)
    model_geometry(source)
    for part in ("vae", "unet", "text_encoder"):
        files = sorted((folder / part).glob("*.safetensors"))
        if not files and not any((folder / part).glob("*.bin")):
            raise ModelError(f"{folder / part} holds no weights; expected a .safetensors file")
        for file in files:
            try:
                with safe_open(file, framework="numpy") as weights:
                    if not weights.keys():
                        raise ModelError(f"{file} holds no tensors")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is damaged or cut short ({error}); fetch the checkpoint again") from error


def model_geometry(source: str) -> Geometry:
    """What sizes a checkpoint works at, read from its configuration alone.

    Raises:
        ModelError: As `checkpoint_folder`, or a configuration this method does not support.
    """
    folder = checkpoint_folder(source)
    try:
        vae = json.loads((folder / "vae" / "config.json").read_text())
        unet = json.loads((folder / "unet" / "config.json").read_text())
        return geometry_of(vae, unet)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot read the checkpoint's configuration ({error})") from error


def geometry_of(vae: Any, unet: Any) -> Geometry:
    """The same, from the configurations of its VAE and UNet."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = unet["sample_size"]
    side = side if isinstance(side, int) else max(side)
    return Geometry(native=side * factor, multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1), factor=factor)
