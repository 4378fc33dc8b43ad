"""What a run was told, as the output remembers it; and whether another may carry it on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import WrongOutputError
from diffedit_ray.settings import EditSettings

PACKAGES = ("diffedit_ray", "ray", "torch", "diffusers", "transformers", "pyarrow", "fsspec", "pillow")


def check_config(output: str, settings: EditSettings, model_revision: str, image_format: str) -> None:
    """Refuse to carry on a run that was made with something else that decides its results.

    What only decides speed does not count, nor does the precision or the device: they move a result by rounding,
    and a job may move from CPUs to GPUs.

    Args:
        output: The output's absolute URI.
        settings: The method's, now.
        model_revision: Of the model, now.
        image_format: Of the edited images, now.

    Raises:
        WrongOutputError: The output was made with others; names each with both values.
        OutputError: Its configuration cannot be read.
    """
    layout = OutputLayout(output)
    held = records.read_json(layout.config)
    if held is None or not storage.list_files(layout.records, ".parquet"):
        return  # a first run that recorded nothing made nothing that another could mix with
    now = {**settings.model_dump(), "model_revision": model_revision, "image_format": image_format}
    before = {
        # a release with one setting more leaves outputs as they are, unless the setting is used
        **EditSettings().model_dump(),
        "model_revision": held.get("model_revision", model_revision),
        "image_format": (held.get("job") or {}).get("image_format", image_format),
        **(held.get("settings") or {}),
    }
    differing = [
        f"{key} {_shown(before[key])} there and {_shown(value)} now"
        for key, value in now.items()
        if before[key] != value
    ]
    if differing:
        raise WrongOutputError(
            f"{storage.shown(output)} was made with other settings than these: {'; '.join(differing)}. "
            "Use those, name another output, or start afresh with --overwrite"
        )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def versions() -> dict[str, str]:
    """Of Python and the packages that results may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
