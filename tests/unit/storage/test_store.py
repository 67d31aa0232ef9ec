"""Laws of a Store, the same for a folder, a bucket, a prefix in a bucket, a real S3 server and a network that fails."""

import itertools
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import draws
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from s3_faults import QUICK, at_random, faulty_s3
from s3_server import new_bucket, s3_environment, s3_server

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore, Store, check_name, open_store

part = st.sampled_from(["a", "ab", "a b", "a-b", "a.b", "a+b", "a%20b", "A", "ä", "z", "0"])
keys = st.lists(part, min_size=1, max_size=3).map("/".join)


@st.composite
def key_sets(draw) -> list[str]:
    """Keys of which none is the folder of another: a disk could not hold both."""
    drawn = draw(st.sets(keys, max_size=8))
    return [key for key in drawn if not any(other.startswith(f"{key}/") for other in drawn)]


@pytest.fixture(scope="module", params=["folder", "prefix", "bucket", "faults", "rados"])
def new_store(request, tmp_path_factory):
    """A function that makes an empty store."""
    top = tmp_path_factory.mktemp("stores")
    with ExitStack() as stack:
        if request.param == "folder":
            yield lambda: LocalStore(top / uuid.uuid4().hex)
            return
        if request.param == "rados":
            gateway = request.getfixturevalue("rados")
            stack.enter_context(s3_environment(gateway.endpoint, top, gateway.access_key, gateway.secret_key))
        else:
            server = stack.enter_context(s3_server(top))
            if request.param == "faults":
                stack.enter_context(faulty_s3(server.endpoint, at_random(seed=0, share=0.1, kinds=QUICK)))
        if request.param == "bucket":
            yield lambda: S3Store(new_bucket(), "")
        else:
            bucket = new_bucket()
            yield lambda: S3Store(bucket, f"some/{uuid.uuid4().hex}")


@pytest.fixture
def store(new_store) -> Store:
    return new_store()


@settings(max_examples=draws(8), deadline=None)
@given(names=key_sets(), data=st.binary(max_size=100))
def test_what_was_put_is_listed_sorted_below_its_folders_only_and_read_back(new_store, names, data):
    store = new_store()
    for i, key in enumerate(names):
        store.put(key, data + bytes([i]))
    folders = {"", "a", "ab", "nowhere"} | {key.rpartition("/")[0] for key in names}
    for folder in folders - set(names):
        below = sorted(key for key in names if not folder or key.startswith(f"{folder}/"))
        assert [item.key for item in store.list(folder)] == below
    assert [store.stat(key) for key in sorted(names)] == list(store.list())
    for i, key in enumerate(names):
        assert store.read(key) == store.fetch(key).read_bytes() == data + bytes([i])


def test_a_range_is_a_slice(store):
    data = b"0123456789"
    store.put("object", data)
    for start, stop in itertools.product((0, 1, 5, 9, 10, 13), (None, 0, 1, 5, 10, 13)):
        assert store.read("object", start, stop) == data[start:stop]


def test_an_empty_object_is_an_object(store):
    store.put("empty", b"")
    assert store.stat("empty").size == 0
    assert store.read("empty") == store.read("empty", 0, 9) == store.fetch("empty").read_bytes() == b""


def test_a_put_replaces_the_whole_object_and_its_fetched_copy(store):
    store.put("a/b", b"long and old")
    old = store.stat("a/b")
    assert store.fetch("a/b").read_bytes() == b"long and old"
    store.put("a/b", b"new")
    assert store.read("a/b") == store.fetch("a/b").read_bytes() == b"new"
    assert store.stat("a/b") != old
    assert [item.key for item in store.list()] == ["a/b"]


def test_a_changed_object_of_the_same_size_is_fetched_anew(store):
    for data in (b"old!", b"new!"):
        store.put("x", data)
        assert store.fetch("x").read_bytes() == data


@pytest.mark.parametrize("size", [0, 5, 9 << 20])  # the largest goes to S3 in two parts
def test_a_file_is_stored_whole(store, tmp_path, size):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    store.put_file("a/copy", source)
    assert store.fetch("a/copy").read_bytes() == source.read_bytes()
    assert store.stat("a/copy").size == size
    assert source.exists()


def test_the_first_writer_wins_and_the_object_stays_as_it_was(store):
    assert store.put_if_absent("lock", b"first")
    assert not store.put_if_absent("lock", b"second")
    assert store.read("lock") == b"first"
    store.delete("lock")
    assert store.put_if_absent("lock", b"third")
    assert store.read("lock") == b"third"


def test_of_several_writers_exactly_one_wins(store):
    for round_ in range(5):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, key=f"lock-{round_}": store.put_if_absent(key, b"%d" % i), range(8)))
        assert sum(won) == 1
        assert store.read(f"lock-{round_}") == b"%d" % won.index(True)


def test_a_deleted_object_is_gone_its_neighbours_stay_and_deleting_nothing_is_no_error(store):
    for key in ("a/b/c", "a/d"):
        store.put(key, key.encode())
    for _ in range(2):
        store.delete("a/b/c")
        assert not store.exists("a/b/c")
        assert [item.key for item in store.list()] == ["a/d"]
    store.delete("never/was")
    assert store.read("a/d") == b"a/d"


def test_what_is_not_there_is_an_error_that_names_it(store, tmp_path):
    assert store.stat("no/such") is None
    assert not store.exists("no/such")
    assert list(store.list("no")) == []
    for ask in (store.read, store.fetch):
        with pytest.raises(DataError, match="no/such"):
            ask("no/such")
    with pytest.raises(DataError, match=r"cannot write|upload failed"):
        store.put_file("a", tmp_path / "no-such-file")
    assert not store.exists("a")


def test_a_folder_is_no_object(store):
    store.put("folder/file", b"x")
    assert not store.exists("folder")
    assert store.stat("folder") is None
    with pytest.raises(DataError):
        store.read("folder")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", ".."])
def test_a_key_that_leaves_the_root_is_refused(store, tmp_path, key):
    (tmp_path / "source").write_bytes(b"x")
    for call in (
        lambda: store.put(key, b"x"),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.put_file(key, tmp_path / "source"),
        lambda: store.read(key),
        lambda: store.fetch(key),
        lambda: store.stat(key),
        lambda: store.exists(key),
        lambda: store.delete(key),
        lambda: list(store.list(key)),
    ):
        with pytest.raises(DataError, match="leaves the storage root"):
            call()


def test_a_place_that_can_be_written_to_is_left_as_it_was(store):
    store.check_writable("storage.root", need_bytes=1)
    assert list(store.list()) == []


def test_a_store_is_what_its_url_opens_also_in_another_process(store):
    assert open_store("storage.root", store.url) == store
    assert pickle.loads(pickle.dumps(store)) == store


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host/x", "s3://", "s3:///x"])
def test_a_place_that_is_no_storage_is_refused_by_name(url):
    with pytest.raises(ConfigError, match=r"storage\.root"):
        open_store("storage.root", url)


@pytest.mark.parametrize("name", ["", ".", "..", "...", "a/b", "../a", "a\n", "a b", "ä", "x" * 129])
def test_a_name_that_is_no_one_part_of_a_path_is_refused(name):
    with pytest.raises(ConfigError, match="run: must be"):
        check_name("run", name)


@given(st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True))
def test_a_name_that_was_taken_is_one_part_of_a_path(name):
    assume(set(name) != {"."})
    assert check_name("run", name) == name
    assert Path("/root", name).resolve() == Path("/root") / name != Path("/root")
