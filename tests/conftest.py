from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.pipeline.cluster import start_ray
from tests.services.s3 import S3Server, s3_server
from tests.services.web import FileServer
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LatentDiffusionModel:
    return LatentDiffusionModel.load(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def _ray_ends() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(_ray_ends: None) -> None:
    # once for all modules, but for those that come after one with a cluster of its own
    start_ray()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()


@pytest.fixture
def web_files() -> Iterator[FileServer]:
    with FileServer().running() as server:
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that look at single calls of a network: with more threads each gets its part of a batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)
