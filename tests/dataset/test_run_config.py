from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffedit_ray.dataset import records
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.dataset.run_config import check_config, versions
from diffedit_ray.errors import OutputError, WrongOutputError
from diffedit_ray.settings import EditSettings, JobSettings
from tests.dataset.outputs import record, write

HELD = EditSettings(steps=20)


def _output(tmp_path: Path, **config: Any) -> str:
    told = {
        "model_revision": "r1",
        "settings": HELD.model_dump(),
        "job": JobSettings(batch_size=4, dtype="float32").model_dump(),
        **config,
    }
    records.write_json(OutputLayout(str(tmp_path)).config, told)
    write(tmp_path, record("a"))
    return str(tmp_path)


def test_an_output_without_a_run_may_be_used_by_any(tmp_path: Path) -> None:
    check_config(str(tmp_path / "none"), EditSettings(), "r1", "png")


def test_a_run_that_recorded_nothing_holds_nobody_up(tmp_path: Path) -> None:
    output = _output(tmp_path)
    for file in (tmp_path / "records").iterdir():
        file.unlink()
    check_config(output, EditSettings(resolution=64), "r2", "webp")


def test_a_run_with_the_same_settings_may_carry_on(tmp_path: Path) -> None:
    # batch size, precision and the like are in the file and are not compared
    check_config(_output(tmp_path), HELD, "r1", "png")


@pytest.mark.parametrize("name", EditSettings.model_fields)
def test_every_setting_of_the_method_counts(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {
        "composite": False,
        "seed": 5,
        "resolution": 64,
        "steps": 21,
        "mask_grow": 2,
        "solver": "dpm++",
    }
    values |= {"mask_maps": 3, "guidance_scale": 3.0, "mask_significance": 1.0, "encoding_ratio": 0.7}
    settings = HELD.with_overrides({name: values.get(name, 0.25)})
    with pytest.raises(WrongOutputError, match=name):
        check_config(_output(tmp_path), settings, "r1", "png")


def test_the_refusal_names_each_difference_with_both_values_and_the_ways_out(tmp_path: Path) -> None:
    output = _output(tmp_path)
    with pytest.raises(WrongOutputError) as caught:
        check_config(output, EditSettings(resolution=64), "r2", "webp")
    assert str(caught.value) == (
        f"{output} was made with other settings than these: steps 20 there and 50 now; "
        "resolution none there and 64 now; model_revision r1 there and r2 now; image_format png there and webp now. "
        "Use those, name another output, or start afresh with --overwrite"
    )


def test_a_release_with_one_setting_more_leaves_outputs_as_they_are(tmp_path: Path) -> None:
    older = {name: value for name, value in HELD.model_dump().items() if name != "mask_grow"}
    output = _output(tmp_path, settings=older)
    check_config(output, HELD, "r1", "png")
    with pytest.raises(WrongOutputError, match="mask_grow 1 there and 3 now"):
        check_config(output, HELD.with_overrides({"mask_grow": 3}), "r1", "png")


def test_a_damaged_file_is_no_licence(tmp_path: Path) -> None:
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run" / "config.json").write_text("oops")
    with pytest.raises(OutputError, match=r"config\.json is damaged"):
        check_config(str(tmp_path), HELD, "r1", "png")


def test_versions_name_what_results_may_depend_on() -> None:
    assert {"python", "torch", "ray", "diffedit_ray"} <= set(versions())
