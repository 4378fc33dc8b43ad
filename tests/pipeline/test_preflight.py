from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.identity import identity
from diffedit_ray.errors import ModelError, PreflightError
from diffedit_ray.pipeline.preflight import check_images, check_model, check_output
from tests.services.s3 import S3Server


def test_an_output_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    check_output(str(tmp_path / "out"))
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_an_output_below_a_file_says_what_cannot_be_done_as_whom(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match=r"cannot write to the output .*file/out.*tried as user "):
        check_output(str(tmp_path / "file" / "out"))


def test_one_readable_or_merely_missing_image_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"anything")
    nowhere = "http://127.0.0.1:9/a.png"
    check_images([nowhere, str(tmp_path / "a.png")], max_bytes=100)
    check_images([str(tmp_path / "missing.png")], max_bytes=100)
    check_images([], max_bytes=100)


def test_images_out_of_reach_are_named(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"nosuch://bucket/a.png.*--storage-options"):
        check_images(["nosuch://bucket/a.png"], max_bytes=100)


def test_a_checkpoint_cut_short_is_found_without_loading_it(tiny_folder: Path, tmp_path: Path) -> None:
    check_model(str(tiny_folder))
    broken = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"unet.*damaged or cut short"):
        check_model(str(broken))
    weights.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        check_model(str(broken))


def test_identity_names_the_key_and_hides_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert identity(str(tmp_path)).startswith("user ")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIsecret")
    said = identity("s3://bucket/key")
    assert "AKIA…MPLE" in said
    assert "env" in said
    assert "IOSFODNN" not in said
    assert "secret" not in said


@pytest.fixture
def refused(s3: S3Server, bucket: str) -> Iterator[str]:
    """A bucket, with a key that may not use it."""
    if s3.kind == "moto":
        pytest.skip("needs a server that checks credentials")
    storage.configure({"s3": {**s3.options, "key": "AKIAWRONGWRONGNG1", "secret": "not the secret"}})
    yield f"s3://{bucket}"
    storage.configure({})


def test_a_wrong_credential_is_told_at_once_and_as_whom(refused: str) -> None:
    began = time.monotonic()
    with pytest.raises(PreflightError) as output:
        check_output(f"{refused}/out")
    with pytest.raises(PreflightError) as images:
        check_images([f"{refused}/a.png", f"{refused}/b.png"], max_bytes=100)
    assert time.monotonic() - began < 10
    for said in (str(output.value), str(images.value)):
        assert refused in said
        assert "AKIA…GNG1" in said
        assert "--storage-options" in said
        assert "not the secret" not in said
    assert "cannot write to the output" in str(output.value)


def test_an_output_on_s3_is_left_as_it_was(s3: S3Server, bucket: str) -> None:
    storage.configure({"s3": s3.options})
    try:
        check_output(f"s3://{bucket}/out")
    finally:
        storage.configure({})
    assert s3.filesystem().find(bucket) == []
