from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffedit_ray.dataset import storage
from diffedit_ray.diffusion.checkpoint import model_geometry
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line
from tests.pipeline.rows import save_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def edit(tiny_folder: Path) -> Edit:
    return Edit(str(tiny_folder), "cpu", 2, model_geometry(str(tiny_folder)), JobSettings(dtype="float32"))


@pytest.fixture(autouse=True)
def _storage() -> Iterator[None]:
    yield
    storage.configure({})


@pytest.fixture
def line(edit: Edit, tiny_folder: Path, folder: Path, tmp_path: Path) -> Line:
    return Line(edit, str(tiny_folder), folder, tmp_path / "out")
