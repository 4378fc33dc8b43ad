"""What a user may set: `EditSettings` is the method, `JobSettings` the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffedit_ray.errors import SettingsError


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Any:
        """A validated copy with some fields changed.

        Raises:
            SettingsError: An unknown field, or a value outside its range.
        """
        try:
            return type(self)(**{**self.model_dump(), **overrides})
        except ValidationError as error:
            raise SettingsError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """A validation error in one line: every wrong field, what it was given, and what it takes."""
    parts = []
    for item in error.errors():
        field = ".".join(str(p) for p in item["loc"]) or "settings"
        parts.append(f"{field}: {item['msg'][:1].lower()}{item['msg'][1:]} (got {item['input']!r})")
    return "; ".join(parts)


class EditSettings(_Settings):
    """How one image is edited. Every field can also be a manifest column, for that row alone."""

    steps: int = Field(50, ge=2, le=1000, description="Steps of the DDIM grid over the whole noise range (paper: 50).")
    encoding_ratio: float = Field(
        0.8,
        gt=0,
        le=1,
        description="How far the image is encoded towards noise, as a share of the grid: the paper's r. "
        "Lower keeps more of the old object's shape.",
    )
    guidance_scale: float = Field(
        7.5, ge=1, le=50, description="Classifier-free guidance while decoding; 1 is none (paper: 7.5)."
    )
    mask_threshold: float = Field(
        0.5, ge=0, le=1, description="Contrast above which a latent cell is edited, after rescaling to [0, 1]."
    )
    mask_strength: float = Field(
        0.5, gt=0, le=1, description="Noise level at which the two texts are compared, as a share of the grid."
    )
    mask_maps: int = Field(10, ge=1, le=100, description="Noise samples averaged for the mask: the paper's n.")
    mask_clip: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Quantile of each contrast map above which values count as extremes and are clipped; 1 clips none.",
    )
    mask_significance: float = Field(
        2.0,
        ge=0,
        description="Least F ratio of the contrast between latent cells to its spread over the noise samples; "
        "below it the texts do not disagree anywhere in particular and the row is left unchanged. 0 turns this off.",
    )
    composite: bool = Field(
        True, description="Keep the original's own pixels outside the mask; off returns the decoder's whole picture."
    )
    mask_grow: int = Field(
        1, ge=0, le=16, description="Latent cells by which the mask is grown before pixels are composited."
    )
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="Side, in pixels, of the square whose area the model works at; none is the model's own.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the row's noise; none derives it from the image URI."
    )


class JobSettings(_Settings):
    """How a run is done. None of these but the image format changes a result."""

    batch_size: int = Field(16, ge=1, le=1024, description="Rows an actor edits at once.")
    min_actors: int = Field(1, ge=1, description="Model replicas kept at the least.")
    max_actors: int | None = Field(
        None, ge=1, description="Model replicas at the most; none is one a GPU, or one in all on CPUs."
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps: where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the model; auto is float32 on CPUs and bfloat16 or float16 on GPUs."
    )
    threads: int | None = Field(
        None, ge=1, description="Torch threads of an actor on CPUs; none shares the cores out among the actors."
    )
    image_format: Literal["png", "jpg", "webp"] = Field(
        "png", description="Format of edited images. png and webp are lossless and keep alpha."
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="Largest image accepted, in pixels; guards against decompression bombs."
    )
    max_bytes: int = Field(200_000_000, ge=1, description="Largest image file accepted, in bytes.")
    fetch_threads: int = Field(16, ge=1, le=256, description="Images one fetch task reads at the same time.")
    fetch_timeout: float = Field(60.0, gt=0, description="Seconds one image may take to arrive.")
    max_failed: float = Field(
        1.0, ge=0, le=1, description="Share of failed rows above which the run ends with exit code 3; 1 allows any."
    )
    retry_failed: bool = Field(
        True, description="Try rows again that failed in an earlier run and may succeed by themselves: a timeout, say."
    )
    retry_permanent: bool = Field(
        False,
        description="Try rows again whose failure lasts until somebody mends them: a missing image, a corrupt one.",
    )
    overwrite: bool = Field(
        False, description="Remove what the output holds, whatever settings it was made with, and edit every row again."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Contract column -> the manifest's own name for it."
    )
