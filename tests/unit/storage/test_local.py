"""What only a disk can get wrong: kills, half-written files, links, permissions, space."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore

KILLED_WRITER = """
import os, sys
from pathlib import Path
from dllm_core.storage.store import LocalStore
os.fsync = lambda handle: os._exit(9)  # every byte is in the file, and nobody has been promised anything
store, (verb, source) = LocalStore(Path(sys.argv[1])), sys.argv[2:]
getattr(store, verb)("a/b", Path(source) if verb == "put_file" else b"new")
"""


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def write_and_be_killed(store: LocalStore, verb: str, source: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(store.root), verb, str(source)]
    assert subprocess.run(command, check=False, cwd=store.root.parent).returncode == 9


@pytest.mark.parametrize("verb", ["put", "put_if_absent", "put_file"])
def test_a_killed_write_leaves_no_object_and_is_no_obstacle(store, tmp_path, verb):
    source = tmp_path / "source"
    source.write_bytes(b"new")
    write_and_be_killed(store, verb, source)
    [left] = (store.root / "a").iterdir()  # the temporary file: the kill came in the middle of a write
    assert left.read_bytes() == b"new"
    assert not store.exists("a/b")
    assert list(store.list()) == []
    assert store.put_if_absent("a/b", b"whole")
    assert store.read("a/b") == b"whole"


def test_a_killed_write_leaves_the_old_object(store, tmp_path):
    store.put("a/b", b"old")
    write_and_be_killed(store, "put", tmp_path)
    assert store.read("a/b") == b"old"
    assert [item.key for item in store.list()] == ["a/b"]


def test_a_failed_write_leaves_nothing(store):
    store.put("file", b"x")
    store.put("folder/file", b"x")
    for key in ("file/below", "folder"):
        with pytest.raises(DataError, match=f"{key}.*cannot write"):
            store.put(key, b"y")
    assert sorted(path.name for path in store.root.rglob("*")) == ["file", "file", "folder"]


def test_pieces_that_break_off_leave_the_old_object(store):
    def pieces():
        yield b"first"
        raise DataError("elsewhere", "broke off")

    store.put_pieces("a/b", [b"o", b"", b"ld"])
    with pytest.raises(DataError, match="elsewhere: broke off"):
        store.put_pieces("a/b", pieces())
    assert store.read("a/b") == b"old"
    assert [path.name for path in (store.root / "a").iterdir()] == ["b"]


def test_a_file_put_in_its_own_place_stays(store):
    store.put("a/b", b"x")
    store.put_file("a/b", store.path("a/b"))
    assert store.read("a/b") == b"x"


def test_a_link_whose_answer_was_lost_has_won(store, monkeypatch):
    """As NFS may answer: the request was sent twice, and the second finds what the first made."""
    link = os.link

    def link_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert store.put_if_absent("a/b", b"x")
    assert not store.put_if_absent("a/b", b"y")
    assert store.read("a/b") == b"x"


def test_the_last_object_takes_its_empty_folders_with_it_and_never_the_root(store):
    store.put("a/b/c/d", b"x")
    store.put("a/e", b"x")
    store.delete("a/b/c/d")
    assert [path.name for path in store.root.iterdir()] == ["a"]
    assert [path.name for path in (store.root / "a").iterdir()] == ["e"]
    store.delete("a/e")
    assert store.root.is_dir()
    assert not any(store.root.iterdir())


def test_a_root_at_the_top_of_the_disk_has_keys_like_any_other(tmp_path):
    top, folder = LocalStore(Path("/")), str(tmp_path).lstrip("/")
    top.put(f"{folder}/a/b", b"x")
    top.put(f"{folder}/a/c", b"x")
    assert [item.key for item in top.list(folder)] == [f"{folder}/a/b", f"{folder}/a/c"]
    assert all(top.stat(item.key) == item for item in top.list(folder))
    top.delete(f"{folder}/a/b")
    assert [item.key for item in top.list(folder)] == [f"{folder}/a/c"]
    assert top.path(f"{folder}/a/c") == tmp_path / "a" / "c"


def test_a_link_out_of_the_root_is_read_and_a_broken_one_is_no_object(store, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"linked")
    store.root.mkdir()
    (store.root / "good").symlink_to(tmp_path / "elsewhere")
    (store.root / "broken").symlink_to(tmp_path / "nowhere")
    (store.root / "loop").symlink_to(store.root / "loop")
    assert [item.key for item in store.list()] == ["good"]
    assert store.read("good") == b"linked"
    assert store.stat("broken") is store.stat("loop") is None


def test_a_link_to_a_folder_is_followed_and_one_that_leads_back_is_not(store, tmp_path):
    store.put("a/b/x", b"x")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "y").write_bytes(b"linked")
    (tmp_path / "elsewhere" / "again").symlink_to(store.root / "a")
    for name, target in {
        "out": tmp_path / "elsewhere",
        "self": store.root,
        "up": tmp_path,
        "round": "..",
        "all": "/",
    }.items():
        (store.root / "a" / name).symlink_to(target)
    assert [item.key for item in store.list()] == ["a/b/x", "a/out/deep/y"]
    assert [item.key for item in store.list("a/out")] == ["a/out/again/b/x", "a/out/deep/y"]
    assert store.read("a/out/deep/y") == b"linked"


def test_folders_behind_links_are_listed_as_they_are_read_and_a_circle_is_gone_through_once(store, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode())
    (tmp_path / "one" / "other").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "other").symlink_to(tmp_path / "one")
    store.put("own", b"x")
    (store.root / "link").symlink_to(tmp_path / "one")
    (store.root / "up").symlink_to(store.root)
    assert [item.key for item in store.list()] == ["link/file", "link/other/file", "own"]
    assert [item.key for item in store.list("link")] == ["link/file", "link/other/file"]
    assert all(store.stat(item.key) == item for item in store.list())
    (tmp_path / "root-link").symlink_to(store.root)
    assert [item.key for item in LocalStore(tmp_path / "root-link").list()] == [item.key for item in store.list()]


def test_a_fetched_file_is_the_object_itself(store):
    store.put("a", b"x")
    assert store.fetch("a").samefile(store.root / "a")


def test_too_little_space_is_told_before_anything_is_written(store):
    with pytest.raises(DataError, match=r"storage\.root: .* MiB free, .* MiB needed") as caught:
        store.check_writable("storage.root", need_bytes=1 << 62)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_to_is_refused(store):
    store.root.mkdir(mode=0o500)
    if os.access(store.root, os.W_OK):
        pytest.skip("this user writes everywhere")
    with pytest.raises(DataError, match=r"storage\.root: cannot write"):
        store.check_writable("storage.root")


def test_a_file_where_the_root_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=r"storage\.root: cannot write"):
            LocalStore(root).check_writable("storage.root")


def test_a_key_below_a_file_is_no_object(store):
    store.put("file", b"x")
    assert list(store.list("file")) == []
    assert not store.exists("file/below")
    store.delete("file/below")
    assert store.read("file") == b"x"


@pytest.mark.parametrize("key", ["a\0b", "a\ud800b"])
def test_a_key_that_cannot_be_a_name_is_refused_in_one_line(store, key):
    for call in (store.stat, store.read, store.delete, store.fetch, lambda key: store.put(key, b"")):
        with pytest.raises(DataError, match="cannot be a file's name"):
            call(key)
