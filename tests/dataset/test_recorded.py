from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from diffedit_ray.dataset.keys import keys, newest
from diffedit_ray.dataset.recorded import Recorded, read_recorded
from diffedit_ray.errors import ErrorCode, OutputError
from tests.dataset.outputs import failure, record, write

HEX = "0123456789abcdef0123456789abcdef"


class TestKeys:
    def test_equal_strings_and_no_others_have_equal_keys(self) -> None:
        texts = ["a", "b", "a", "", HEX, HEX.upper(), HEX[:-1], f"{HEX}0", f"{HEX}\n", "é", "0" * 32, "00" * 15 + "01"]
        found = keys(texts)
        equal = found[:, None] == found[None, :]
        assert equal.tolist() == [[a == b for b in texts] for a in texts]

    def test_a_key_does_not_depend_on_its_neighbours(self) -> None:
        assert keys([HEX, "own"])[0] == keys([HEX])[0] == bytes.fromhex(HEX)

    def test_numbers_sort_as_keys_do(self) -> None:
        found = keys([f"id-{i}" for i in range(1000)])
        at = newest(found, np.zeros(1000, np.int64))
        assert (np.sort(found) == found[at]).all()


@pytest.fixture
def output(tmp_path: Path) -> str:
    write(tmp_path, record("edited"), record("same", status="unchanged"))
    write(
        tmp_path,
        failure("gone", ErrorCode.NOT_FOUND, attempts=2),
        failure("slow", ErrorCode.TIMEOUT, attempts=3),
        record("same", 9, fingerprint="older"),
    )
    return str(tmp_path)


def _settled(recorded: Recorded, *, retry_failed: bool = True, retry_permanent: bool = False) -> set[str]:
    names = ["edited", "same", "gone", "slow"]
    settled = recorded.settled(retry_failed=retry_failed, retry_permanent=retry_permanent)
    return {name for name, at in zip(names, recorded.find(keys(names)), strict=True) if settled[at]}


class TestRecorded:
    def test_an_empty_output(self, tmp_path: Path) -> None:
        recorded = read_recorded(str(tmp_path / "none"))
        assert len(recorded.ids) == 0
        assert recorded.find(keys(["a"])).tolist() == [-1]
        assert recorded.settled(retry_failed=True, retry_permanent=True).tolist() == []

    def test_the_newest_record_of_every_id(self, output: str) -> None:
        recorded = read_recorded(output)
        at = recorded.find(keys(["same", "none", "slow"]))
        assert at[1] == -1
        assert recorded.statuses[at[[0, 2]]].tolist() == [1, 2]
        assert recorded.attempts[at[2]] == 3
        assert recorded.code_names[recorded.codes[at[2]]] == "timeout"
        assert recorded.codes[at[0]] == -1
        assert recorded.repeated.tolist() == keys(["same"]).tolist()
        assert (np.sort(recorded.ids) == recorded.ids).all()

    @pytest.mark.parametrize(
        ("retry_failed", "retry_permanent", "again"),
        [
            (True, False, {"slow"}),
            (True, True, {"slow", "gone"}),
            (False, False, set[str]()),
            (False, True, {"gone"}),
        ],
    )
    def test_which_failures_are_tried_again(
        self, output: str, retry_failed: bool, retry_permanent: bool, again: set[str]
    ) -> None:
        settled = _settled(read_recorded(output), retry_failed=retry_failed, retry_permanent=retry_permanent)
        assert {"edited", "same", "gone", "slow"} - settled == again

    def test_a_failure_that_later_succeeded_is_done(self, output: str) -> None:
        write(Path(output), record("slow", -5))
        assert "slow" in _settled(read_recorded(output), retry_permanent=True)

    def test_a_code_this_release_does_not_know_may_pass(self, tmp_path: Path) -> None:
        write(tmp_path, record("slow", status="failed", error_code="cosmic_ray"))
        assert _settled(read_recorded(str(tmp_path))) == set()

    def test_the_commonest_case_ids_that_are_fingerprints(self, tmp_path: Path) -> None:
        write(tmp_path, record(HEX, fingerprint=HEX), record(HEX[::-1], fingerprint=HEX[::-1]))
        recorded = read_recorded(str(tmp_path))
        at = recorded.find(keys([HEX]))
        assert recorded.prints[at].tolist() == [int(HEX[:16], 16)]

    def test_it_stays_small(self, tmp_path: Path) -> None:
        rows = [record("x" * 150 + str(i), query="y" * 500) for i in range(2000)]
        write(tmp_path, *rows)
        recorded = read_recorded(str(tmp_path))
        assert len(pickle.dumps(recorded)) < 45 * len(rows)

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        write(tmp_path, record("a"))
        (tmp_path / "records" / "records-0.parquet").write_text("oops")
        with pytest.raises(OutputError, match=r"records-0\.parquet is not a readable record file"):
            read_recorded(str(tmp_path))
