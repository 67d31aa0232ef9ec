"""What only a network can get wrong: missing buckets, lost answers, pages, stale copies."""

import pytest
from s3_server import s3_server

from dllm_core.errors import DataError
from dllm_core.storage.s3 import S3Store, _client, cache_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture
def store(server) -> S3Store:
    return S3Store(server.new_bucket(), "some/where")


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


def test_a_server_that_is_down_is_asked_once_before_a_run(server, store):
    before = server.requests
    server.is_down = True
    try:
        with pytest.raises(DataError, match=r"storage\.root: put_object failed"):
            store.check_writable("storage.root")
    finally:
        server.is_down = False
    assert server.requests == before + 1


def test_an_endpoint_that_is_no_url_is_told_in_one_line(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    _client.cache_clear()
    try:
        for call in (lambda: store.check_writable("storage.root"), lambda: store.read("key")):
            with pytest.raises(DataError, match="nonsense"):
                call()
    finally:
        _client.cache_clear()


def test_a_writer_whose_answer_was_lost_still_knows_that_it_won(server, store):
    server.answers_to_lose = 1
    assert store.put_if_absent("lock", b"mine")
    assert server.answers_to_lose == 0
    assert not store.put_if_absent("lock", b"theirs")
    assert store.read("lock") == b"mine"


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


def test_the_cache_holds_what_it_may_and_drops_what_was_used_longest_ago(server, store, monkeypatch):
    for name in "abcd":
        store.put(name, name.encode() * 100)
    monkeypatch.setenv("DLLM_CACHE_BYTES", "250")
    first = store.fetch("a")
    second = store.fetch("b")
    store.fetch("a")  # used again: `b` is now the oldest
    third = store.fetch("c")
    assert first.exists()
    assert third.read_bytes() == b"c" * 100
    assert not second.exists()
    assert store.fetch("b").read_bytes() == b"b" * 100
