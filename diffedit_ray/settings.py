"""What a user may set: `EditSettings` is the method, `JobSettings` the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Secret, ValidationError, field_validator

from diffedit_ray.errors import SettingsError


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Any:
        """A validated copy with some fields changed.

        Raises:
            SettingsError: An unknown field, or a value outside its range.
        """
        try:
            return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **overrides})
        except ValidationError as error:
            raise SettingsError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """A validation error in one line: every wrong field, what it was given, and what it takes."""
    parts = []
    for item in error.errors():
        field = ".".join(str(p) for p in item["loc"]) or "settings"
        secret = item["loc"][:1] == ("storage_options",) or item["type"] == "extra_forbidden"  # it, misspelt
        given = "" if secret else f" (got {item['input']!r})"
        parts.append(f"{field}: {item['msg'][:1].lower()}{item['msg'][1:]}{given}")
    return "; ".join(parts)


class StorageOptions(Secret[dict[str, dict[str, Any]]]):
    """Protocol -> options of its fsspec filesystem. Whatever prints or dumps it gets the names, never a value.

    Plain dictionaries are taken where one is wanted; `get_secret_value` gives them back, and so does pickling.
    """

    def _display(self) -> str:
        return ", ".join(f"{protocol}({', '.join(held)})" for protocol, held in self.get_secret_value().items())


class EditSettings(_Settings):
    """How one image is edited. Every field can also be a manifest column, for that row alone."""

    solver: Literal["ddim", "dpm++"] = Field(
        "ddim",
        description="ddim is the paper's. dpm++ (DPM-Solver++, second order, and its inverse) needs fewer than half "
        "the steps; docs/performance.md says what that costs in quality.",
    )
    steps: int = Field(
        50, ge=2, le=1000, description="Steps of the time grid over the whole noise range (paper: 50; dpm++: 20 to 25)."
    )
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
        0.5,
        ge=0,
        lt=1,
        description="Share of the contrast's energy (squared excess over its median) whose cells count as extremes "
        "and are clipped; 0 clips none.",
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
    """How a run is done. None of these but the image format changes a result by more than rounding."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a password

    batch_size: int = Field(16, ge=1, le=1024, description="Rows an actor edits at once.")
    unet_batch: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Latents the UNet sees at once; none measures at start-up which number is fastest there, "
        "except in reproducible runs.",
    )
    compile: bool = Field(
        False,
        description="Compile the UNet at start-up, for images of the model's own size: minutes that pay in long runs. "
        "CPUs need a C++ compiler and Python's headers for it. Batches of other sizes than `unet_batch`, its half and "
        "its quarter are cut into those and a rest that runs uncompiled.",
    )
    min_actors: int = Field(1, ge=1, description="Model replicas kept at the least.")
    max_actors: int | None = Field(
        None, ge=1, description="Model replicas at the most; none is one a GPU, or one in all on CPUs."
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps: where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the model; auto is float32 on CPUs, bfloat16 on GPUs that have it, else float16.",
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
    fetch_timeout: float = Field(
        120.0, gt=0, description="Seconds one image, and again its mask, may take to arrive, all tries included."
    )
    edit_timeout: float = Field(
        600.0, gt=0, description="Seconds the edit of one row may take; a batch may take that for each of its rows."
    )
    store_timeout: float = Field(120.0, gt=0, description="Seconds one row's image and mask may take to be written.")
    row_tries: int = Field(
        2,
        ge=1,
        le=10,
        description="Times a row may kill or hang the process that works on it alone before it is recorded as failed.",
    )
    group_by_image: bool = Field(
        False,
        description="Bring the rows of one image together wherever they stand in the manifest, so that they share the "
        "work that depends on the image alone; rows that stand side by side do so anyway. The first edit then waits "
        "until the whole manifest is planned.",
    )
    reproducible: bool = Field(
        False,
        description="Pad every batch to one size, so that a row's bytes never depend on the rows beside it; "
        "off, they may differ by 1/255 here and there. Costs nothing where batches are full.",
    )
    storage_options: StorageOptions = Field(
        default_factory=lambda: StorageOptions({}),
        description="Options of the fsspec filesystem of each protocol, as JSON or as the path of a JSON file, which "
        'keeps secrets out of the process list: {"s3": {"endpoint_url": …, "key": …, "secret": …}}. What they leave '
        "out comes from the environment. Never shown, logged or recorded.",
    )
    storage_tries: int = Field(
        5, ge=1, le=100, description="Times one read, write or listing is tried before it has failed; 1 tries no more."
    )
    storage_seconds: float = Field(
        60.0, gt=0, description="Seconds that all tries of one read, write or listing may take together."
    )
    image_schemes: list[str] | None = Field(
        None,
        description="Schemes that image and mask URIs may have, such as s3 or https; file is a path. "
        "None allows every one that fsspec knows.",
    )
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

    @field_validator("image_schemes")
    @classmethod
    def _schemes(cls, given: list[str] | None) -> list[str] | None:
        return None if given is None else [scheme.strip().removesuffix("://").lower() for scheme in given]
