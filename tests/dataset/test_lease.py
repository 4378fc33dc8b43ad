from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest

from diffedit_ray.dataset import lease as lease_module
from diffedit_ray.dataset import storage
from diffedit_ray.dataset.lease import Claim, Lease, current_claim
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import OutputError
from tests.services.s3 import S3Server

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from diffedit_ray.dataset.lease import Lease
with Lease(sys.argv[1], seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""

# making a file that must not exist tells, across processes, whether somebody else is inside
RACE = """
import os, random, sys, time
from diffedit_ray.dataset.lease import Lease
from diffedit_ray.errors import OutputError
output, rounds = sys.argv[1], int(sys.argv[2])
inside, held = f"{output}.inside", 0
for _ in range(rounds):
    try:
        with Lease(output):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            time.sleep(random.uniform(0, 0.01))
            os.remove(inside)
            held += 1
    except OutputError:
        time.sleep(random.uniform(0, 0.01))
print(held)
"""


@pytest.fixture(params=["disk", "memory", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "out")
    elif request.param == "memory":
        yield "memory://bucket/out"
        fsspec.filesystem("memory").store.clear()
    else:
        server: S3Server = request.getfixturevalue("s3")
        with pytest.MonkeyPatch.context() as environment:  # which the subprocesses share
            environment.setenv("AWS_ENDPOINT_URL", server.endpoint)
            environment.setenv("AWS_ACCESS_KEY_ID", server.key)
            environment.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield f"s3://{server.make_bucket()}/out"


def _claims(output: str) -> list[str]:
    return storage.list_files(OutputLayout(output).leases, ".json")


def _put(output: str, claim: Claim) -> str:
    uri = storage.join(OutputLayout(output).leases, f"{claim.run}.json")
    storage.write_bytes(uri, json.dumps(asdict(claim)).encode())
    return uri


def _elsewhere(run: str = "other", **values: object) -> Claim:
    """A run on another machine."""
    return replace(Claim.of_this_process(run), host="node-7", boot="another", held=True, **values)  # type: ignore[arg-type]


def _start(program: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )


class TestHolding:
    def test_the_second_is_refused_and_told_who_has_it(self, output: str) -> None:
        with Lease(output):
            with pytest.raises(OutputError) as caught, Lease(output):
                pytest.fail("two at once")
            message = str(caught.value)
            assert f"{output} is in use by another run: " in message
            assert f"(process {os.getpid()}), since 20" in message
            assert "free 60 s from now" in message or "free 59 s from now" in message
            assert len(_claims(output)) == 1, "the refused one leaves nothing behind"

    def test_it_is_free_again_after_the_end_and_after_an_error(self, output: str) -> None:
        with Lease(output):
            pass
        with pytest.raises(ZeroDivisionError), Lease(output):
            raise ZeroDivisionError
        assert _claims(output) == []
        with Lease(output) as lease:
            assert not lease.lost

    def test_two_outputs_are_two_leases(self, output: str) -> None:
        with Lease(output), Lease(f"{output}-2"):
            assert len(_claims(output)) == len(_claims(f"{output}-2")) == 1

    def test_it_is_renewed_for_as_long_as_it_is_held(self, output: str) -> None:
        seconds = 4 if output.startswith("s3:") else 1  # S3 tells whole seconds
        with Lease(output, seconds=seconds):
            (uri,) = _claims(output)
            began = storage.modified(uri)
            time.sleep(2.5 * seconds)
            assert storage.modified(uri) > began + seconds
            with pytest.raises(OutputError, match="in use"), Lease(output, seconds=seconds):
                pass

    def test_one_that_only_asks_does_not_stand_in_the_way_for_ever(self, output: str) -> None:
        _put(output, replace(_elsewhere(), held=False))
        began = time.monotonic()
        with pytest.raises(OutputError, match=r"asked for by several runs at once.*node-7"), Lease(output):
            pass
        assert time.monotonic() - began < 30
        assert len(_claims(output)) == 1

    def test_whoever_cannot_write_is_told_so(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        with pytest.raises(OutputError, match="cannot write"), Lease(str(tmp_path / "out")):
            pass


class TestExpiring:
    def test_a_run_on_a_machine_that_died_stands_until_its_lease_is_over(self, output: str) -> None:
        uri = _put(output, _elsewhere())
        with pytest.raises(OutputError, match=r"on node-7 .*free [12] s from now"), Lease(output, seconds=2):
            pass
        time.sleep(3.2)
        with Lease(output, seconds=2):
            assert uri not in _claims(output), "its successor clears it away"

    def test_no_two_clocks_are_compared(self, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = storage.modified
        monkeypatch.setattr(storage, "modified", lambda uri: whole(uri) - 86_400)
        with Lease(output), pytest.raises(OutputError, match="in use"), Lease(output):
            pass

    def test_a_claim_of_a_later_release_counts_by_its_age(self, output: str) -> None:
        storage.write_bytes(storage.join(OutputLayout(output).leases, "new.json"), b'{"run": "new", "zone": "b"}')
        with pytest.raises(OutputError, match="an unknown host"), Lease(output):
            pass


class TestLosing:
    def test_a_run_whose_claim_is_gone_notices(self, output: str, caplog: pytest.LogCaptureFixture) -> None:
        with Lease(output, seconds=1) as lease:
            storage.remove(_claims(output)[0])
            for _ in range(100):
                if lease.lost:
                    break
                time.sleep(0.05)
            assert lease.lost
            assert "has taken" in caplog.text
            time.sleep(0.5)
            assert _claims(output) == [], "it does not come back to life"

    def test_one_that_slept_too_long_gives_way_to_its_successor(self, output: str) -> None:
        with Lease(output) as lease:
            _put(output, _elsewhere())
            lease._renew()
            assert not lease.lost, "awake all the time, it knows better than a claim that has no right to be there"
            lease._renewed -= 100
            lease._renew()
            assert lease.lost
            assert [uri.rsplit("/")[-1] for uri in _claims(output)] == ["other.json"]

    def test_one_that_slept_while_nobody_came_goes_on(self, output: str) -> None:
        with Lease(output) as lease:
            lease._renewed -= 100
            lease._renew()
            assert not lease.lost

    def test_a_store_that_is_away_for_a_moment_is_no_loss(
        self, output: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def away(uri: str) -> float:
            raise OSError("503 Slow Down")

        with Lease(output, seconds=0.4) as lease:
            with monkeypatch.context() as patch:
                patch.setattr(storage, "modified", away)
                time.sleep(0.6)
            assert "could not be renewed: 503" in caplog.text
            time.sleep(0.4)
            assert not lease.lost


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
class TestSameMachine:
    def test_a_killed_run_is_succeeded_at_once(self, tmp_path: Path) -> None:
        output = str(tmp_path / "out")
        holder = _start(HOLD, output, 60)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"\(process {holder.pid}\)"), Lease(output):
            pass
        holder.kill()
        time.sleep(0.5)
        with Lease(output):  # nobody has reaped it yet: it is a zombie
            assert len(_claims(output)) == 1
        holder.communicate()
        with Lease(output):
            pass

    def test_this_process_is_alive(self) -> None:
        claim = Claim.of_this_process("x")
        assert claim.here
        assert not claim.died

    def test_a_process_id_used_again_is_another_process(self) -> None:
        claim = Claim.of_this_process("x")
        assert claim.process_started is not None
        assert replace(claim, process_started=claim.process_started - 1).died

    @pytest.mark.parametrize("change", [{"boot": "other"}, {"boot": None}, {"namespace": "pid:[1]"}])
    def test_of_processes_it_cannot_see_nothing_is_concluded(self, change: dict[str, str | None]) -> None:
        gone = replace(Claim.of_this_process("x"), pid=2**22 + 1)
        assert gone.died
        assert not replace(gone, **change).died  # type: ignore[arg-type]


class TestRacing:
    def test_threads(self, output: str) -> None:
        inside = threading.Semaphore(1)
        held, twice = [], []

        def run() -> None:
            for _ in range(12):
                try:
                    with Lease(output):
                        if not inside.acquire(blocking=False):
                            twice.append(1)
                            continue
                        time.sleep(0.002)
                        inside.release()
                        held.append(1)
                except OutputError:
                    time.sleep(0.002)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not twice
        assert len(held) >= 4
        assert _claims(output) == []

    def test_processes(self, tmp_path: Path) -> None:
        racers = [_start(RACE, tmp_path / "out", 40) for _ in range(3)]
        held = [int(racer.communicate(timeout=300)[0]) for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * 3, "FileExistsError: two were inside at once"
        assert sum(held) >= 40

    def test_those_that_ask_at_the_very_same_moment_step_back_and_one_gets_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # both have written before either lists: the worst case, made certain
        barrier = threading.Barrier(2, timeout=10)
        whole = lease_module._others
        listed: dict[str, int] = {}

        def together(output: str, own: str) -> object:
            listed[own] = listed.get(own, 0) + 1
            if listed[own] == 1:
                barrier.wait()
            found = whole(output, own)
            if listed[own] == 1:
                barrier.wait()
            return found

        monkeypatch.setattr(lease_module, "_others", together)
        ends: list[str] = []
        over = threading.Barrier(2, timeout=30)

        def run() -> None:
            try:
                with Lease(str(tmp_path / "out")):
                    ends.append("held")
                    over.wait()
            except OutputError:
                ends.append("refused")
                over.wait()

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ends) == ["held", "refused"]


class TestLooking:
    def test_at_nothing(self, output: str) -> None:
        assert current_claim(output) is None

    def test_at_a_run(self, output: str) -> None:
        with Lease(output) as lease:
            claim = current_claim(output)
            assert claim is not None
            assert claim.run == lease.run
            assert len(_claims(output)) == 1, "looking writes nothing"
        assert current_claim(output) is None

    def test_at_one_elsewhere_that_stopped_renewing(self, output: str) -> None:
        _put(output, _elsewhere())
        assert current_claim(output) is not None
        assert current_claim(output, seconds=0) is None

    def test_at_one_that_only_asks(self, output: str) -> None:
        _put(output, replace(_elsewhere(), held=False))
        assert current_claim(output) is None
