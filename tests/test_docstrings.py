"""The examples in the public docstrings, run."""

from __future__ import annotations

import doctest

import pytest

import diffedit_ray


@pytest.mark.parametrize("name", ["DiffEditor", "edit_dataset", "run_edit_job"])
@pytest.mark.usefixtures("local_ray")
def test_docstring_example(name: str) -> None:
    tests = doctest.DocTestFinder(recurse=False).find(getattr(diffedit_ray, name), name)
    assert sum(len(test.examples) for test in tests) >= 4
    for test in tests:
        report: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
        assert result.failed == 0, "".join(report)
