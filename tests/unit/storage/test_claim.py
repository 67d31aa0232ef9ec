"""At most one driver has a run on S3, whoever dies, sleeps or comes late; and one that ended is not waited for."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_server

from dllm_core.errors import DataError
from dllm_core.storage import claim as claims
from dllm_core.storage.claim import Claim, claimed
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import StoredObject

FOLDER = "runs/x/.claims"
DRIVER = """
import sys
from dllm_core.errors import DataError
from dllm_core.storage.claim import claimed
from dllm_core.storage.store import open_store
store = open_store("", sys.argv[1])
store.exists("warm")
print("ready", flush=True)
sys.stdin.readline()
try:
    with claimed(store, "runs/x/.claims", "run"):
        print("held", flush=True)
        sys.stdin.readline()
except DataError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("cache")) as running:
        S3Store(running.new_bucket(), "").exists("warm")  # a client costs time
        yield running


@pytest.fixture
def store(server) -> S3Store:
    return S3Store(server.new_bucket(), "some/where")


@pytest.fixture
def hasty(monkeypatch):
    """Lives that are shown and missed within a second."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claims, "LEASE_S", 0.6)


def new(store) -> Claim:
    return Claim(store, FOLDER, "run")


def elsewhere(store, monkeypatch, **here) -> Claim:
    """One by a driver on another machine, taken; no process here has its id."""
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_here", lambda: {"host": "far", "machine": "another", **here})
        claim = new(store)
    claim._holder["pid"] = 2**22 + 1
    claim.acquire()
    return claim


@contextmanager
def beating(claim: Claim):
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            claim.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def standing(store) -> dict[str, dict]:
    return {item.key: json.loads(store.read(item.key)) for item in store.list(FOLDER)}


def refused(store) -> str:
    with pytest.raises(DataError) as caught:
        new(store).acquire()
    return str(caught.value)


def seconds(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def test_of_threads_that_begin_at_once_one_has_it(store, hasty):
    start, end = threading.Barrier(6), threading.Barrier(6)

    def drive(_):
        start.wait()
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(store, FOLDER, "run"))
                return "held"
            except DataError as error:
                return str(error)
            finally:
                end.wait()

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(drive, range(6)))
    me = f"{claims._here()['host']}, pid {os.getpid()}"
    line = f"run: another dllm is at work on this run ({me}): wait for it, or end it"
    assert sorted(told) == sorted(["held", *[line] * 5])


def test_of_processes_that_begin_at_once_one_has_it_and_when_it_is_killed_the_next_does_not_wait(store):
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    words = [sys.executable, "-c", DRIVER, store.url]
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    drivers = [subprocess.Popen(words, env=environment, **piped) for _ in range(2)]
    try:
        for driver in drivers:
            assert driver.stdout.readline() == "ready\n", driver.stderr.read()
        for driver in drivers:
            driver.stdin.write("\n")
            driver.stdin.flush()
        told = [driver.stdout.readline() for driver in drivers]
        [holder] = [driver for driver, line in zip(drivers, told, strict=True) if line == "held\n"]
        assert sum(f"pid {holder.pid}): wait for it" in line for line in told) == 1
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        successor = new(store)
        assert seconds(successor.acquire) < claims.HEARTBEAT_S / 2
        assert [*standing(store)] == [f"{FOLDER}/00000002"]
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


def test_an_id_that_another_process_has_by_now_is_no_holder(store):
    old = new(store)
    old._holder["started"] -= 1
    old.acquire()
    assert seconds(new(store).acquire) < claims.HEARTBEAT_S / 2


@pytest.mark.parametrize("here", [{}, {"host": claims._here()["host"]}, {"machine": None}])
def test_a_holder_elsewhere_that_is_silent_is_taken_over_after_the_lease_and_not_before(
    store, hasty, monkeypatch, here, caplog
):
    """Also in another container of this machine, whose processes are not seen from here."""
    gone = elsewhere(store, monkeypatch, **here)
    assert 0.6 <= seconds(new(store).acquire) < 4
    assert "claimed by another dllm" in caplog.text
    gone.beat()
    assert gone.taken_by == f"{claims._here()['host']}, pid {os.getpid()}"


def test_where_it_is_not_known_whose_processes_are_seen_the_lease_is_waited_for(store, hasty, monkeypatch):
    nowhere = {"host": "near", "machine": None}
    elsewhere(store, monkeypatch, **nowhere)
    monkeypatch.setattr(claims, "_here", lambda: nowhere)
    assert 0.6 <= seconds(new(store).acquire) < 4


def test_who_looked_and_slept_while_others_came_and_went_has_nothing(store):
    late, first, second = new(store), new(store), new(store)
    assert late._look() == (0, b"")
    first.acquire()
    first.release()
    second.acquire()
    assert not late._win(1)
    second.beat()
    assert second.taken_by is None


def test_a_holder_elsewhere_that_beats_is_left_alone(store, hasty, monkeypatch):
    with beating(elsewhere(store, monkeypatch)):
        assert "another dllm is at work on this run (far, pid" in refused(store)
        assert "another dllm is at work" in refused(store)


@pytest.mark.parametrize("finds_out", [True, False])
def test_a_holder_that_slept_cannot_release_or_beat_away_the_winner_s(store, hasty, monkeypatch, finds_out):
    slept = elsewhere(store, monkeypatch)
    winner = new(store)
    assert winner._win(2)
    if finds_out:
        slept.beat()
    else:  # its beat was under way when it fell asleep
        store.put(f"{FOLDER}/00000001", slept._content(is_released=False))
    slept.release()
    with beating(winner):
        assert "another dllm is at work" in refused(store)
    winner.beat()
    assert winner.taken_by is None
    winner.release()
    assert standing(store)[f"{FOLDER}/00000002"]["is_released"]
    new(store).acquire()
    assert [*standing(store)] == [f"{FOLDER}/00000003"]


def test_a_block_is_released_at_its_end_whatever_ends_it(store):
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), claimed(store, FOLDER, "run"):
            raise error
    with claimed(store, FOLDER, "run") as is_lost:
        assert not is_lost()
    assert [values["is_released"] for values in standing(store).values()] == [True]
    assert [*standing(store)] == [f"{FOLDER}/00000004"]


def test_a_block_that_has_lost_its_claim_is_interrupted_and_says_so(store, hasty, monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    begun = time.monotonic()

    def drive():
        with claimed(store, FOLDER, "run") as is_lost:
            with monkeypatch.context() as patch:
                patch.setattr(claims, "_here", lambda: {"host": "far", "machine": None})
                assert new(store)._win(2)
            try:
                time.sleep(20)
            except KeyboardInterrupt:
                assert is_lost()
                raise

    with pytest.raises(DataError, match=r"run: another dllm has taken this run over \(far, pid"):
        drive()
    assert time.monotonic() - begun < 5
    assert signal.getsignal(signal.SIGUSR1) is before
    assert [values["is_released"] for values in standing(store).values()] == [False]


def test_outside_the_main_thread_a_lost_block_says_so_at_its_end(store, hasty):
    def drive():
        with claimed(store, FOLDER, "run") as is_lost:
            new(store)._win(2)
            give_up = time.monotonic() + 10
            while not is_lost() and time.monotonic() < give_up:
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="has taken this run over"):
        pool.submit(drive).result()


def test_an_error_that_passes_costs_a_beat_and_no_claim(store, hasty, monkeypatch):
    put, left = S3Store.put, [3]

    def failing(self, key, data):
        left[0] -= 1
        if left[0] >= 0:
            raise DataError(key, "503")
        put(self, key, data)

    monkeypatch.setattr(S3Store, "put", failing)
    with claimed(store, FOLDER, "run") as is_lost:
        give_up = time.monotonic() + 10
        while left[0] > -2 and time.monotonic() < give_up:
            time.sleep(0.01)
        assert left[0] <= -2
        assert not is_lost()
    assert standing(store)[f"{FOLDER}/00000001"]["is_released"]


def test_a_claim_that_somebody_took_away_by_hand_is_made_again_or_lost(store):
    first, second = new(store), new(store)
    first.acquire()
    store.delete(f"{FOLDER}/00000001")
    first.beat()
    assert [*standing(store)] == [f"{FOLDER}/00000001"]
    store.delete(f"{FOLDER}/00000001")
    second.acquire()
    first.beat()
    assert first.taken_by is not None
    second.beat()
    assert second.taken_by is None


def test_what_is_no_claim_is_watched_as_one_of_nobody_known(store, hasty):
    store.put(f"{FOLDER}/00000007", b"\xff[")
    store.put(f"{FOLDER}/notes", b"")
    assert 0.6 <= seconds(new(store).acquire) < 4
    assert {item.key for item in store.list(FOLDER)} == {f"{FOLDER}/00000008", f"{FOLDER}/notes"}


def test_it_takes_few_requests(server, store):
    def requests(call) -> int:
        before = server.requests
        call()
        return server.requests - before

    for number in (3, 5, 5):
        claim = new(store)
        assert requests(claim.acquire) == number
        assert requests(claim.beat) == 3
        assert requests(claim.release) == 1


class World:
    """Drivers in threads of which one runs at a time, a store in memory and a clock. A request takes as long as is
    drawn. plans: of each driver when it begins, how often it beats, and whether it dies then.
    """

    def __init__(self, draw: Callable[[], float], plans: list[tuple[float, int, bool]]) -> None:
        self.now, self.objects, self.working, self.peak = 0.0, dict[str, bytes](), set[int](), 0
        self.won, self.problems, self._draw = list[int](), list[str](), draw
        self._turns = [threading.Semaphore(0) for _ in plans]
        self._back, self._wakes = threading.Semaphore(0), {i: plan[0] for i, plan in enumerate(plans)}
        self._threads = [threading.Thread(target=self._drive, args=(i, *plan[1:])) for i, plan in enumerate(plans)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        while self._wakes:
            driver = min(self._wakes, key=lambda i: (self._wakes[i], i))
            self.now = max(self.now, self._wakes[driver])
            self._turns[driver].release()
            self._back.acquire()
        for thread in self._threads:
            thread.join()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, duration: float) -> None:
        driver = int(threading.current_thread().name)
        self._wakes[driver] = self.now + duration
        self._back.release()
        self._turns[driver].acquire()

    def list(self, prefix: str):
        self.sleep(self._draw())
        found = [StoredObject(key, 1, "") for key in sorted(self.objects)]
        self.sleep(self._draw())
        return iter(found)

    def read(self, key: str) -> bytes:
        self.sleep(self._draw())
        if key not in self.objects:
            raise DataError(key, "no such object")
        return self.objects[key]

    def exists(self, key: str) -> bool:
        self.sleep(self._draw())
        return key in self.objects

    def put(self, key: str, data: bytes) -> None:
        self.sleep(self._draw())
        self.objects[key] = data
        self.sleep(self._draw())

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.sleep(self._draw())
        if key in self.objects:
            return False
        self.objects[key] = data
        return True

    def delete(self, key: str) -> None:
        self.sleep(self._draw())
        self.objects.pop(key, None)

    def _drive(self, driver: int, beats: int, dies: bool) -> None:
        threading.current_thread().name = str(driver)
        self._turns[driver].acquire()
        try:
            claim = Claim(self, FOLDER, "run")  # type: ignore[arg-type]
            claim.acquire()
            self.won.append(claim._generation)
            self.working.add(driver)
            self.peak = max(self.peak, len(self.working))
            for _ in range(beats):
                self.sleep(claims.HEARTBEAT_S)
                newest = max(self.won)
                claim.beat()
                if claim.taken_by is not None:
                    return
                if newest != claim._generation:
                    self.problems.append("a beat found nothing though a newer generation stood")
            self.working.discard(driver)
            if not dies:
                claim.release()
        except DataError:
            pass
        except Exception as error:  # noqa: BLE001 (told by the test)
            self.problems.append(repr(error))
        finally:
            self.working.discard(driver)
            del self._wakes[driver]
            self._back.release()


def simulated(seed: int, plans, longest: float) -> World:
    """Most requests take no more than 2 s, one in ten up to `longest`."""
    generator = random.Random(seed)
    world = World(lambda: generator.uniform(0, longest if generator.random() < 0.1 else min(longest, 2)), plans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "time", SimpleNamespace(monotonic=world.monotonic, sleep=world.sleep))
        patch.setattr(claims, "_here", lambda: {"host": threading.current_thread().name, "machine": None})
        patch.setattr(claims, "_LOG", SimpleNamespace(warning=lambda *_: None))
        world.run()
    return world


SEEDS = st.integers(0, 2**32)
PLANS = st.lists(st.tuples(st.floats(0, 90), st.integers(0, 4), st.booleans()), min_size=2, max_size=5)


@settings(max_examples=draws(60))
@given(seed=SEEDS, plans=PLANS)
def test_while_nobody_sleeps_longer_than_the_lease_at_most_one_has_it(seed, plans):
    world = simulated(seed, plans, longest=2.0)
    assert world.problems == []
    assert world.peak <= 1
    assert world.won == sorted(set(world.won))


@settings(max_examples=draws(60))
@given(seed=SEEDS, plans=PLANS)
def test_who_slept_finds_at_its_next_beat_that_another_has_it(seed, plans):
    world = simulated(seed, plans, longest=60.0)
    assert world.problems == []
    assert len(set(world.won)) == len(world.won)
