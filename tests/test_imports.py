from __future__ import annotations

import subprocess
import sys

import pytest

import diffedit_ray

HEAVY = ("torch", "diffusers", "transformers", "ray")


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import diffedit_ray, diffedit_ray.settings, diffedit_ray.errors",
        "from diffedit_ray.dataset import compaction, images, lease, manifest, records, storage",
        "from diffedit_ray.dataset import run_config, scan, status",
        "from diffedit_ray.gallery import contact_sheet",
        "import diffedit_ray.cli",
    ],
)
def test_imports_nothing_heavy(statement: str) -> None:
    assert _loaded_by(statement) == set()


def test_the_stages_leave_torch_to_the_actor() -> None:
    # fetch and store tasks run in processes of their own: torch would cost each a second and 300 MB
    assert _loaded_by("from diffedit_ray.pipeline import edit, fetch, plan, store") == set()


def test_the_driver_reads_a_checkpoint_without_torch() -> None:
    # torch and diffusers cost it six seconds, also when there is nothing to do
    tried = "import diffedit_ray.pipeline.job as job; from diffedit_ray.demo import demo_model"
    tried += "; model = str(demo_model()); job.check_model(model), job.model_revision(model), job.model_geometry(model)"
    assert _loaded_by(tried) == set()


@pytest.mark.parametrize("name", diffedit_ray.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(diffedit_ray, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        diffedit_ray.no_such_name  # noqa: B018
