"""Bulk image editing with DiffEdit on Ray Data.

>>> from diffedit_ray import DiffEditor, EditSettings, edit_dataset, run_edit_job
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffedit_ray.dataset.status import RunStatus, failures, status
    from diffedit_ray.diffusion.editor import DiffEditor
    from diffedit_ray.diffusion.model import LatentDiffusionModel
    from diffedit_ray.diffusion.result import EditResult
    from diffedit_ray.errors import DiffEditError
    from diffedit_ray.pipeline.job import edit_dataset, run_edit_job
    from diffedit_ray.pipeline.summary import JobSummary
    from diffedit_ray.settings import EditSettings, JobSettings

_HOMES = {
    "DiffEditError": "errors",
    "DiffEditor": "diffusion.editor",
    "EditResult": "diffusion.result",
    "EditSettings": "settings",
    "JobSettings": "settings",
    "JobSummary": "pipeline.summary",
    "LatentDiffusionModel": "diffusion.model",
    "RunStatus": "dataset.status",
    "edit_dataset": "pipeline.job",
    "failures": "dataset.status",
    "run_edit_job": "pipeline.job",
    "status": "dataset.status",
}

__all__ = [
    "DiffEditError",
    "DiffEditor",
    "EditResult",
    "EditSettings",
    "JobSettings",
    "JobSummary",
    "LatentDiffusionModel",
    "RunStatus",
    "edit_dataset",
    "failures",
    "run_edit_job",
    "status",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `diffedit-ray --help` and Ray's store tasks should not wait for it
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffedit_ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diffedit_ray' has no attribute {name!r}")
