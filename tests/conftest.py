from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.pipeline.cluster import start_ray
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LatentDiffusionModel:
    return LatentDiffusionModel.load(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)
