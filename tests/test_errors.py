from __future__ import annotations

import pickle

import pytest

from diffedit_ray import errors
from diffedit_ray.errors import DiffEditError, ErrorCode, RowError


def test_a_row_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RowError(ErrorCode.NOT_FOUND, "a.png does not exist")))
    assert type(error) is RowError
    assert error.code is ErrorCode.NOT_FOUND
    assert error.message == "a.png does not exist"
    assert str(error) == "not_found: a.png does not exist"


@pytest.mark.parametrize("name", ["SettingsError", "ManifestError", "ModelError", "OutputError", "RowError"])
def test_one_except_clause_catches_them_all(name: str) -> None:
    assert issubclass(getattr(errors, name), DiffEditError)


def test_codes_are_lower_case_words_that_a_query_can_be_written_with() -> None:
    assert [code for code in ErrorCode if code.value != code.name.lower()] == []
