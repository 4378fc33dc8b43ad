from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffedit_ray.diffusion.editor import DiffEditor
from jobs.memory_growth import growth


def _grown(model: Path) -> float:
    """MiB a batch, once the first ten have filled what is filled but once."""
    measured = list(growth(str(model), batches=40, rows=2, every=10, threads=1))
    return (measured[-1][1] - measured[0][1]) / (measured[-1][0] - measured[0][0])


def test_an_actors_memory_does_not_grow(tiny_folder: Path) -> None:
    assert _grown(tiny_folder) < 0.5


def test_a_leak_of_a_megabyte_a_batch_would_be_seen(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked = []
    whole = DiffEditor.__init__

    def leaking(self: DiffEditor, *args: object, **kwargs: object) -> None:
        whole(self, *args, **kwargs)  # type: ignore[arg-type]
        own = self.edit_fitted

        def edit(*a: object, **k: object) -> object:
            leaked.append(torch.ones(2**18))
            return own(*a, **k)  # type: ignore[arg-type]

        self.edit_fitted = edit  # type: ignore[method-assign,assignment]

    monkeypatch.setattr(DiffEditor, "__init__", leaking)
    assert _grown(tiny_folder) > 0.5
