"""What only a network can get wrong: missing buckets, silence, lost answers, broken bodies, pages, stale copies."""

import errno
import fcntl
import itertools
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import boto3
import moto.s3.models
import pytest
from s3_faults import (
    CONFLICT,
    CUT,
    FAULTS,
    GONE,
    HANG,
    LATE,
    LOST,
    QUICK,
    RESET,
    SLOW_DOWN,
    TOO_MANY,
    TOO_SLOW,
    at_random,
    faulty_s3,
    first,
)
from s3_server import s3_server

from dllm_core.checkpoints.store import FileEntry, verified_file
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.storage import cache, s3
from dllm_core.storage.cache import cache_folder, cached_copy, hold
from dllm_core.storage.s3 import S3Store, _client
from dllm_core.storage.store import LocalStore, file_sha256, sha256

FLOCK = fcntl.flock
PART = 10_000
READING = {"list", "read", "range", "fetch"}
# A conflict is between conditional writers. Silence costs time, so it falls where it differs from a reset.
AFFECTED = {
    CONFLICT: {"put_if_absent"},
    TOO_MANY: {"list", "put"},
    TOO_SLOW: {"put", "put parts"},
    HANG: {"read", "put"},
    LATE: {"put_if_absent", "end parts"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture(scope="module")
def network(server):
    """One for all tests of this file: a client costs time."""
    with faulty_s3(server.endpoint, first(0, RESET, ""), read_seconds=0.5) as running:
        yield running


@pytest.fixture
def faults(network):
    """The network between the stores and their server; a test says what it does from now on."""
    network.choose = first(0, RESET, "")
    return network


@pytest.fixture
def store(server, faults) -> S3Store:
    return S3Store(server.new_bucket(), "some/where")


@pytest.fixture
def large_file(tmp_path, monkeypatch):
    """A file that goes up in three parts, which are smaller than S3 would take."""
    monkeypatch.setattr(s3, "_PART_BYTES", PART)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", PART)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * PART + 1))
    return path


def verbs(store, large_file):
    """By verb: the method and path of its requests, a call, and what it answers or leaves behind."""
    store.put("folder/object", b"0123456789")
    small_file = large_file.parent / "small"
    small_file.write_bytes(b"small")
    new = iter(range(1000))

    def after(write, *arguments):
        key = f"new-{next(new)}"
        answer = write(key, *arguments)
        return answer, store.read(key)

    def deleted():
        store.delete("folder/object")
        gone = not store.exists("folder/object")
        store.put("folder/object", b"0123456789")
        return gone

    whole = large_file.read_bytes()
    return {
        "list": ("GET", "list-type", lambda: [item.key for item in store.list("folder")], ["folder/object"]),
        "stat": ("HEAD", "object", lambda: store.stat("folder/object").size, 10),
        "read": ("GET", "object", lambda: store.read("folder/object"), b"0123456789"),
        "range": ("GET", "object", lambda: store.read("folder/object", 2, 5), b"234"),
        "range beyond the end": ("GET", "object", lambda: store.read("folder/object", 10, 20), b""),
        "fetch": ("GET", "object", lambda: store.fetch("folder/object").read_bytes(), b"0123456789"),
        "put": ("PUT", "new", lambda: after(store.put, b"x"), (None, b"x")),
        "put_if_absent": ("PUT", "new", lambda: after(store.put_if_absent, b"x"), (True, b"x")),
        "put_file": ("PUT", "new", lambda: after(store.put_file, small_file), (None, b"small")),
        "begin parts": ("POST", "uploads", lambda: after(store.put_file, large_file), (None, whole)),
        "put parts": ("PUT", "partNumber", lambda: after(store.put_file, large_file), (None, whole)),
        "end parts": ("POST", "uploadId", lambda: after(store.put_file, large_file), (None, whole)),
        "delete": ("DELETE", "object", deleted, True),
    }


@pytest.mark.parametrize("kind", [*FAULTS, TOO_MANY, TOO_SLOW])
def test_what_passes_is_tried_again_until_it_is_done_right(store, faults, large_file, kind):
    times = 1 if kind in {HANG, LATE} else 2
    for verb, (method, path, call, expected) in verbs(store, large_file).items():
        if verb not in AFFECTED.get(kind, {verb}):
            continue
        before = faults.injected[kind]
        faults.choose = first(times, kind, method, path)
        assert call() == expected, verb
        is_told_by_status = kind == CUT and verb == "range beyond the end"
        assert faults.injected[kind] - before == (1 if is_told_by_status else times), verb


@pytest.mark.parametrize("kind", [SLOW_DOWN, RESET, CUT])
def test_what_does_not_pass_is_told_in_one_line_that_names_the_key_and_leaves_nothing(
    store, faults, large_file, kind, monkeypatch
):
    monkeypatch.setattr(s3, "_ATTEMPTS", 3)
    for verb, (method, path, call, _) in verbs(store, large_file).items():
        if kind == CUT and verb not in READING:
            continue  # what was asked for was done, or the status says it all
        before = faults.injected[kind]
        faults.choose = first(10**6, kind, method, path)
        with pytest.raises(DataError, match=r"(folder|new-\d+)\b.* failed 3 times \(") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert faults.injected[kind] - before in {3, 6, 9}  # 9: three parts at once
    faults.choose = first(0, kind, "")
    assert [item.key for item in store.list()] == ["folder/object"]
    assert "Uploads" not in _client().list_multipart_uploads(Bucket=store.bucket)


def test_of_several_writers_exactly_one_wins_and_knows_it_however_many_answers_are_lost(store, faults):
    faults.choose = at_random(seed=3, share=0.3, kinds=QUICK)
    for round_ in range(4):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, key=f"lock-{round_}": store.put_if_absent(key, b"%d" % i), range(8)))
        assert sum(won) == 1
        assert store.read(f"lock-{round_}") == b"%d" % won.index(True)
    assert min(faults.injected[kind] for kind in (LOST, CONFLICT)) > 0


def test_the_waits_between_tries_grow_to_a_bound_and_are_drawn(store, faults, monkeypatch):
    waits = []
    monkeypatch.setattr(s3, "_FIRST_WAIT", 0.1)
    monkeypatch.setattr(s3.time, "sleep", waits.append)
    faults.choose = first(10**6, SLOW_DOWN, "PUT")
    for _ in range(2):
        with pytest.raises(DataError, match="10 times"):
            store.put("a", b"")
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10] * 2
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert waits[:9] != waits[9:]


def test_a_file_goes_up_in_no_more_parts_than_s3_takes(store, faults, large_file, monkeypatch):
    monkeypatch.setattr(s3, "_MAX_PARTS", 2)
    parts = []
    faults.choose = lambda method, path, headers: parts.append(path) if "partNumber" in path else None
    store.put_file("a", large_file)
    assert len(parts) == 2
    assert store.read("a") == large_file.read_bytes()


def test_a_body_goes_without_a_checksum_that_servers_refuse_and_with_a_signed_one(store, faults):
    seen = []
    faults.choose = lambda method, path, headers: seen.append(headers)
    store.put("a", b"body")
    assert not [name for name in seen[-1] if "checksum" in name.lower() or name.lower() == "transfer-encoding"]
    assert seen[-1]["X-Amz-Content-SHA256"] == sha256(b"body")


def test_an_object_that_is_replaced_while_it_is_fetched_comes_as_one_of_its_versions(
    server, store, faults, monkeypatch
):
    monkeypatch.setattr(s3, "_PIECE_BYTES", 4)
    store.put("a", b"0123456789")
    beside = boto3.client("s3", endpoint_url=server.endpoint)
    pieces = []

    def choose(method, path, headers):
        if method == "GET":
            pieces.append(headers["Range"])
            if len(pieces) == 2:
                beside.put_object(Bucket=store.bucket, Key="some/where/a", Body=b"abcdefghij")

    faults.choose = choose
    assert store.fetch("a").read_bytes() == b"abcdefghij"
    assert set(pieces) == {"bytes=0-3", "bytes=4-7", "bytes=8-11"}


@pytest.mark.parametrize("size", [15, 16, 17, 1000])
def test_pieces_that_come_in_any_order_make_the_object_and_few_are_ahead(store, faults, monkeypatch, size):
    monkeypatch.setattr(s3, "_PIECE_BYTES", 16)
    body = os.urandom(size)
    store.put("a", body)
    at_once, most, lock = 0, 0, threading.Lock()

    def choose(method, path, headers):
        nonlocal at_once, most
        if method == "GET":
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(random.Random(headers["Range"]).uniform(0, 0.05))
            with lock:
                at_once -= 1

    faults.choose = choose
    assert store.fetch("a").read_bytes() == body
    assert most <= 8
    assert (most > 2) == (size == 1000)


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_upload_that_a_lost_answer_has_ended_is_known_by_its_object(server, store, faults, large_file, is_ours):
    """Servers differ: some answer the second request to end an upload as the first, some know no such upload."""
    kinds = itertools.chain([LOST], itertools.repeat(GONE))  # a slow answer makes the client ask once more
    beside = boto3.client("s3", endpoint_url=server.endpoint)

    def choose(method, path, headers):
        if method != "POST" or "uploadId" not in path:
            return None
        kind = next(kinds)
        if kind == GONE and not is_ours:
            beside.put_object(Bucket=store.bucket, Key="some/where/a")
        return kind

    faults.choose = choose
    if is_ours:
        store.put_file("a", large_file)
        assert store.read("a") == large_file.read_bytes()
    else:
        with pytest.raises(DataError, match=r"a: complete_multipart_upload failed [2-9] times \(NoSuchUpload"):
            store.put_file("a", large_file)


def test_a_missing_bucket_is_told_in_one_line_and_at_once(server, tmp_path):
    nowhere = S3Store("no-such-bucket", "x")
    (tmp_path / "file").write_bytes(b"x")
    for call in (
        lambda: list(nowhere.list()),
        lambda: nowhere.read("key"),
        lambda: nowhere.put("key", b""),
        lambda: nowhere.put_if_absent("key", b""),
        lambda: nowhere.put_file("key", tmp_path / "file"),
        lambda: nowhere.check_writable("storage.root"),
    ):
        before = server.requests
        with pytest.raises(DataError, match="NoSuchBucket") as caught:
            call()
        assert "no-such-bucket" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert server.requests == before + 1


def test_a_server_that_stumbles_is_written_to(store, faults):
    faults.choose = first(2, SLOW_DOWN, "PUT")
    store.check_writable("storage.root")
    assert list(store.list()) == []


@pytest.mark.parametrize(("kind", "problem"), [(SLOW_DOWN, "SlowDown"), (HANG, "Read timeout")])
def test_a_server_that_is_down_is_told_before_a_run_long_before_a_run_would(store, faults, kind, problem, monkeypatch):
    monkeypatch.setattr(s3, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(s3, "_READ_SECONDS", 60.0)
    _client.cache_clear()
    try:
        faults.choose, before = first(10**6, kind, "PUT"), faults.injected[kind]
        with pytest.raises(DataError, match=rf"storage\.root: put_object failed.* \({problem}") as caught:
            store.check_writable("storage.root")
    finally:
        _client.cache_clear()
    assert "\n" not in str(caught.value)
    assert faults.injected[kind] - before < s3._ATTEMPTS


def test_an_endpoint_that_is_no_url_is_told_in_one_line(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    _client.cache_clear()
    try:
        for call in (lambda: store.check_writable("storage.root"), lambda: store.read("key")):
            with pytest.raises(DataError, match="nonsense"):
                call()
    finally:
        _client.cache_clear()


@pytest.mark.parametrize("new", ["not there", "expired"])
def test_credentials_that_run_out_are_asked_for_until_there_are_good_ones_and_else_told_in_one_line(
    server, store, monkeypatch, tmp_path, new
):
    given, moments = tmp_path / "given.json", itertools.count()

    def give(minutes: int) -> None:
        end = datetime.now(UTC) + timedelta(minutes=minutes)
        keys = {"AccessKeyId": "x", "SecretAccessKey": "x", "SessionToken": "x", "Expiration": end.isoformat()}
        given.write_text(json.dumps({"Version": 1, **keys}))

    def spoil() -> None:
        given.unlink() if new == "not there" else give(minutes=-1)
        boto3.DEFAULT_SESSION.get_credentials()._expiry_time = datetime.now(UTC)

    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {given}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setattr(s3.time, "sleep", lambda seconds: next(moments) == 1 and give(minutes=60))
    _client.cache_clear()
    try:
        give(minutes=60)
        store.put("key", b"old")
        spoil()
        store.put("key", b"new")
        assert store.read("key") == b"new"
        monkeypatch.setattr(s3.time, "sleep", lambda seconds: None)
        spoil()
        with pytest.raises(DataError, match=r"put_object failed 10 times .*credentials") as told:
            store.put("key", b"newer")
        assert "\n" not in str(told.value)
    finally:
        _client.cache_clear()


def test_a_listing_goes_on_over_its_pages(store, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    keys = [f"folder/{i:02d}" for i in range(10)]
    for key in keys:
        store.put(key, b"")
    page = _client().list_objects_v2(Bucket=store.bucket)
    assert (page["KeyCount"], page["IsTruncated"]) == (3, True)
    assert [item.key for item in store.list("folder")] == keys


def test_a_folder_marker_is_no_object(store):
    _client().put_object(Bucket=store.bucket, Key="some/where/folder/")
    store.put("folder/file", b"x")
    assert [item.key for item in store.list()] == [item.key for item in store.list("folder")] == ["folder/file"]


def test_objects_beside_the_prefix_are_not_seen(store):
    beside = S3Store(store.bucket, "some/where-else")
    beside.put("x", b"x")
    assert list(store.list()) == []
    assert not store.exists("x")


def test_what_was_fetched_is_not_downloaded_again_unless_its_copy_was_cut_short(server, store):
    store.put("a", b"bytes")
    copy = store.fetch("a")
    assert cache_folder() in copy.parents
    before = server.requests
    assert store.fetch("a") == copy
    assert server.requests == before + 1  # the question for its ETag
    copy.write_bytes(b"byt")
    assert store.fetch("a").read_bytes() == b"bytes"


def test_of_many_that_want_an_object_at_once_one_asks_for_it(server, store):
    store.put("a", b"bytes" * 1000)
    begun = server.requests
    together = threading.Barrier(8)

    def fetched(_):
        together.wait()
        return store.fetch("a").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetched, range(8))) == {b"bytes" * 1000}
    assert server.requests == begun + 8 + 1  # each asks for its ETag, one for its bytes


def flock_over_nfs(file, how):
    """As Linux does it: by a lock of all bytes, which to be alone takes a file that may be written to."""
    if how & fcntl.LOCK_EX and not file.writable():
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    FLOCK(file, how)


@pytest.mark.parametrize("flock", [FLOCK, flock_over_nfs])
def test_what_is_held_is_not_dropped_whatever_the_cache_may_hold(store, monkeypatch, tmp_path, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    for name in "abc":
        store.put(name, name.encode() * 100)
    monkeypatch.setenv("DLLM_CACHE_BYTES", "150")
    held, loose = store.fetch("a"), store.fetch("b")
    assert not held.exists()
    held = store.fetch("a")
    assert not loose.exists()
    assert hold(held)
    assert not hold(loose)
    loose = store.fetch("b")
    store.fetch("c")
    assert held.read_bytes() == b"a" * 100
    assert not loose.exists()


def test_a_file_that_is_dropped_between_its_hash_and_its_hold_is_fetched_again(store, monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    for name in "abc":
        store.put(name, name.encode() * 100)
    monkeypatch.setenv("DLLM_CACHE_BYTES", "150")
    others = iter("bc")

    def hash_while_others_fetch(path):
        digest = file_sha256(path)
        store.fetch(next(others, "a"))
        return digest

    monkeypatch.setattr("dllm_core.storage.store.file_sha256", hash_while_others_fetch)
    path = verified_file(store, "a", FileEntry(bytes=100, sha256=sha256(b"a" * 100)), "a")
    assert path.read_bytes() == b"a" * 100
    monkeypatch.setattr("dllm_core.checkpoints.store.hold", lambda path: False)
    with pytest.raises(
        DataError, match="dropped from the cache again and again: set a larger DLLM_CACHE_BYTES"
    ) as told:
        verified_file(store, "a", FileEntry(bytes=100, sha256=sha256(b"a" * 100)), "a")
    assert not isinstance(told.value, CheckpointError)


def test_the_cache_holds_what_it_may_and_drops_what_was_used_longest_ago(server, store, monkeypatch):
    for name in "abcd":
        store.put(name, name.encode() * 100)
    monkeypatch.setenv("DLLM_CACHE_BYTES", "250")
    first = store.fetch("a")
    second = store.fetch("b")
    for path in (first, second):  # fetched long ago, as the clock of files, which ticks every 4 ms, sees it
        os.utime(path, (0, 0))
    store.fetch("a")  # used again: `b` is now the oldest
    third = store.fetch("c")
    assert first.exists()
    assert third.read_bytes() == b"c" * 100
    assert not second.exists()
    assert store.fetch("b").read_bytes() == b"b" * 100


def test_a_cache_is_looked_through_once_in_a_part_of_its_limit_and_holds_little_more(monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    limit, size = 64 * 20, 10
    monkeypatch.setenv("DLLM_CACHE_BYTES", str(limit))
    looks, look = [], LocalStore.list
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix: looks.append(prefix) or look(self, prefix))
    for number in range(200):
        cached_copy(f"{number}", size, lambda: [b"x" * size])
        if number % 20 == 19:
            held = sum(path.stat().st_size for path in (tmp_path / "objects").iterdir())
            assert min(limit, size * (number + 1)) <= held <= limit + limit // 64
    assert len(looks) == 1 + 199 // 2


def gathered(name, data):
    """Of a file that is fetched, checked and held, as of a bundle's."""
    path = cached_copy(name, len(data), lambda: [data])
    assert hold(path)
    return cache.gather(f"all of {name}", {"file": path}, lambda _, copy: copy.read_bytes() == data)


def test_folders_of_links_take_no_room_leave_with_their_files_and_stay_while_these_are_held(monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("DLLM_CACHE_BYTES", "1")
    folders = [gathered(name, name.encode()) for name in "abc"]
    assert gathered("b", b"b") == folders[1]
    assert all(
        (folder / "file").samefile(tmp_path / "objects" / name) for folder, name in zip(folders, "abc", strict=True)
    )
    for name in "ac":  # the process that had them has ended
        cache._HELD.pop(tmp_path / "objects" / name).close()
    cached_copy("d", 1, lambda: [b"d"])
    assert [folder.exists() for folder in folders] == [False, True, False]
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["all of b"]


def test_where_there_are_no_links_folders_have_copies_which_are_held_and_damaged_ones_are_made_anew(
    monkeypatch, tmp_path
):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("DLLM_CACHE_BYTES", "1")
    with ThreadPoolExecutor(4) as pool:  # at once
        [folder] = set(pool.map(gathered, "a" * 4, [b"a"] * 4))
    cached_copy("d", 1, lambda: [b"d"])
    assert (folder / "file").read_bytes() == b"a"
    (folder / "file").write_bytes(b"damaged")
    assert (gathered("a", b"a") / "file").read_bytes() == b"a"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("told", ["20GB", "-1", "1e9"])
def test_a_limit_that_is_no_number_of_bytes_is_told_in_a_line(store, monkeypatch, told):
    store.put("a", b"a")
    monkeypatch.setenv("DLLM_CACHE_BYTES", told)
    with pytest.raises(ConfigError, match=f"^DLLM_CACHE_BYTES: '{told}' is not a number of bytes"):
        store.fetch("a")


def test_what_a_killed_fetch_left_goes_and_what_is_being_written_stays(store, monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    (tmp_path / "objects").mkdir()
    left, written = tmp_path / "objects" / ".x.tmp-left", tmp_path / "objects" / ".y.tmp-new"
    for path in (left, written):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    store.put("a", b"a")
    store.fetch("a")
    assert not left.exists()
    assert written.exists()
