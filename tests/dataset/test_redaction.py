from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffedit_ray.dataset.redaction import remember_secrets, shown


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    remember_secrets({})


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://ann:pw@host/a.png", "https://***@host/a.png"),
        ("https://ann:p@w@host:80/a@2x.png", "https://***@host:80/a@2x.png"),
        ("https://h/a?X-Amz-Date=1&X-Amz-Signature=beef&w=3", "https://h/a?X-Amz-Date=1&X-Amz-Signature=***&w=3"),
        ("https://h/a?X-Amz-Credential=AK%2F1&X-Amz-Security-Token=t", "https://h/a?X-Amz-Credential=***"
         "&X-Amz-Security-Token=***"),
        ("https://h/a?sv=2024&sig=abc%3D", "https://h/a?sv=2024&sig=***"),
        ("https://h/a?AWSAccessKeyId=AK&Expires=1&Signature=s", "https://h/a?AWSAccessKeyId=***&Expires=1&Signature=***"),
        ("https://h/a#access_token=t", "https://h/a#access_token=***"),
    ],
)  # fmt: skip
def test_credentials_in_a_uri_are_masked_and_the_rest_stays(uri: str, expected: str) -> None:
    assert shown(uri) == expected
    assert shown(f"Cannot connect to '{uri}' [Errno 111]") == f"Cannot connect to '{expected}' [Errno 111]"


@pytest.mark.parametrize("uri", ["s3://b/a@b.png", "/data/what?.png", "https://h/a.png?w=300&v=2", "a b.png"])
def test_what_is_no_credential_stays(uri: str) -> None:
    assert shown(uri) == uri


def test_the_secrets_of_the_options_are_masked_wherever_they_turn_up() -> None:
    remember_secrets(
        {
            "s3": {
                "endpoint_url": "http://store.example",
                "key": "AKIDAKID",
                "client_kwargs": {"api_key": "0123456789"},
            },
            "https": {"headers": {"Authorization": "Bearer abcdefgh"}},
        }
    )
    text = "http://store.example refused AKIDAKID, 0123456789 and Bearer abcdefgh"
    assert shown(text) == "http://store.example refused ***, *** and ***"
    remember_secrets({})
    assert shown(text) == text
