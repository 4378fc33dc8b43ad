from __future__ import annotations

import json
import pickle

import pytest
from pydantic import BaseModel, ValidationError

from diffedit_ray.errors import SettingsError
from diffedit_ray.settings import EditSettings, JobSettings, explain


@pytest.mark.parametrize("model", [EditSettings, JobSettings])
def test_every_field_says_what_it_is(model: type[BaseModel]) -> None:
    short = [name for name, info in model.model_fields.items() if len(info.description or "") < 20]
    assert short == []


def test_the_defaults_are_the_papers() -> None:
    s = EditSettings()
    assert (s.steps, s.encoding_ratio, s.guidance_scale) == (50, 0.8, 7.5)
    assert (s.mask_threshold, s.mask_strength, s.mask_maps) == (0.5, 0.5, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 1),
        ("steps", 2.5),
        ("encoding_ratio", 0),
        ("encoding_ratio", 1.01),
        ("guidance_scale", 0.5),
        ("guidance_scale", float("inf")),
        ("mask_threshold", float("nan")),
        ("mask_maps", 0),
        ("mask_grow", -1),
        ("resolution", 8),
        ("seed", -1),
        ("seed", 2**63),
        ("composite", "perhaps"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{field}: ") as caught:
        EditSettings().with_overrides({field: value})
    assert "\n" not in str(caught.value)


def test_overrides_are_validated_like_the_constructor() -> None:
    changed = EditSettings(steps=20).with_overrides({"guidance_scale": 3, "seed": 5.0})
    assert (changed.steps, changed.guidance_scale, changed.seed) == (20, 3.0, 5)
    assert isinstance(changed.seed, int)
    with pytest.raises(SettingsError, match="step_count"):
        EditSettings().with_overrides({"step_count": 20})


def test_settings_are_frozen_and_hashable() -> None:
    # Edit groups rows by them
    assert len({EditSettings(steps=9), EditSettings(steps=9), EditSettings(steps=10)}) == 2
    with pytest.raises(ValidationError):
        EditSettings().steps = 3  # type: ignore[misc]


OPTIONS = {"s3": {"endpoint_url": "http://store", "key": "AKSWORDFISH", "secret": "swordfish"}}


class TestStorageOptions:
    def test_whatever_prints_or_dumps_them_gets_names_only(self) -> None:
        job = JobSettings(storage_options=OPTIONS)
        told = [repr(job), str(job), f"{job.storage_options!r}", str(job.storage_options), job.model_dump_json()]
        told += [
            str(job.model_dump()),
            json.dumps(job.model_dump(), default=str),
            json.dumps(job.model_dump(mode="json")),
        ]
        assert [t for t in told if "swordfish" in t.lower()] == []
        assert all("s3(endpoint_url, key, secret)" in t for t in told)

    def test_they_survive_the_way_to_a_worker_and_overrides(self) -> None:
        job = pickle.loads(pickle.dumps(JobSettings(storage_options=OPTIONS)))
        assert job.storage_options.get_secret_value() == OPTIONS
        assert job.with_overrides({"batch_size": 2}).storage_options.get_secret_value() == OPTIONS

    @pytest.mark.parametrize("wrong", ["swordfish", {"s3": "swordfish"}, {"s3": ["swordfish"]}, ["swordfish"]])
    def test_wrong_ones_are_refused_without_being_shown(self, wrong: object) -> None:
        with pytest.raises(ValidationError) as caught:
            JobSettings(storage_options=wrong)  # type: ignore[arg-type]
        assert "swordfish" not in f"{caught.value} {caught.value!r} {explain(caught.value)}"
        with pytest.raises(SettingsError) as refused:
            JobSettings().with_overrides({"storage_option": wrong})
        assert "swordfish" not in str(refused.value)


def test_schemes_are_written_as_people_write_them() -> None:
    assert JobSettings(image_schemes=["S3://", " https"]).image_schemes == ["s3", "https"]
    assert JobSettings().image_schemes is None


def test_explain_names_every_wrong_field_and_what_it_was_given() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSettings(batch_size=0, image_format="gif")  # type: ignore[arg-type]
    line = explain(caught.value)
    assert "batch_size: " in line
    assert "(got 0)" in line
    assert "image_format: " in line
    assert "'gif'" in line
    assert "\n" not in line
