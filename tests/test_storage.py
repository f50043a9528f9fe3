"""Files are whole or not there, have the modes of other files, and unfinished work outlives what interrupted it."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from fasc.errors import StorageError, UsageError
from fasc.storage import (
    cache_root,
    is_full,
    new_file,
    new_folder,
    read_json,
    require_free_space,
    storage_error,
    sweep,
    work_folder,
    write_json,
)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=lambda mask: f"umask{mask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


class TestNewFile:
    def test_it_appears_when_it_is_whole(self, tmp_path):
        file = tmp_path / "deep" / "x"
        with new_file(file) as scratch:
            scratch.write_text("all of it")
            assert not file.exists()
        assert file.read_text() == "all of it"
        assert [entry.name for entry in file.parent.iterdir()] == ["x"]

    @pytest.mark.parametrize("problem", [ValueError("bad"), KeyboardInterrupt()], ids=lambda problem: type(problem).__name__)
    def test_a_body_that_fails_changes_nothing(self, tmp_path, problem):
        file = tmp_path / "x"
        file.write_text("before")
        with pytest.raises(type(problem)), new_file(file) as scratch:
            scratch.write_text("half")
            raise problem
        assert file.read_text() == "before"
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "x")
        with new_file(tmp_path / "link") as scratch:
            scratch.write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "x").read_text() == "new"

    def test_its_mode_is_that_of_any_new_file(self, tmp_path, umask):
        with new_file(tmp_path / "x") as scratch:
            scratch.touch(mode=0o600)
        assert mode(tmp_path / "x") == 0o666 & ~umask

    def test_a_tilde_is_the_users_home(self, tmp_path, monkeypatch):
        from pathlib import Path

        monkeypatch.setenv("HOME", str(tmp_path))
        write_json(Path("~/x.json"), 1)
        assert (tmp_path / "x.json").is_file()


class TestNewFolder:
    def test_it_appears_when_it_is_whole(self, tmp_path):
        with new_folder(tmp_path / "x") as scratch:
            (scratch / "a").touch()
            assert not (tmp_path / "x").exists()
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["a"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_the_old_one_goes_when_the_new_one_stands(self, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "old").touch()
        with new_folder(tmp_path / "x", overwrite=True) as scratch:
            (scratch / "new").touch()
            assert (tmp_path / "x" / "old").exists()
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["new"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_a_body_that_fails_changes_nothing(self, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "old").touch()
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x", overwrite=True) as scratch:
            (scratch / "new").touch()
            raise KeyboardInterrupt
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["old"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_one_that_appeared_meanwhile_is_not_replaced(self, tmp_path):
        with pytest.raises(StorageError, match="already exists"), new_folder(tmp_path / "x") as scratch:
            (scratch / "ours").touch()
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "theirs").touch()
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["theirs"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_its_modes_are_those_of_any_new_file(self, tmp_path, umask):
        with new_folder(tmp_path / "x") as scratch:
            (scratch / "deep").mkdir(mode=0o700)
            (scratch / "deep" / "file").touch(mode=0o600)
        assert mode(tmp_path / "x") == mode(tmp_path / "x" / "deep") == 0o777 & ~umask
        assert mode(tmp_path / "x" / "deep" / "file") == 0o666 & ~umask

    def test_what_the_system_refuses_is_one_line(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot write"), new_folder(tmp_path / "file" / "x"):
            pytest.fail("there is no such place")


SWAP = """
import os, signal, sys
from pathlib import Path
from fasc import storage

step, path = int(sys.argv[2]), Path(sys.argv[1])
calls = []

def dying(function):
    def call(*given, **named):
        calls.append(function)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return call

Path.rename, storage.shutil.rmtree = dying(Path.rename), dying(storage.shutil.rmtree)
with storage.new_folder(path, overwrite=True) as scratch:
    (scratch / "content").write_text("new")
"""


@pytest.mark.parametrize("step", range(4))
def test_killed_at_any_step_of_the_swap_the_old_or_the_new_folder_is_whole(tmp_path, step):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "content").write_text("old")
    done = subprocess.run([sys.executable, "-c", SWAP, str(folder), str(step)], check=False)
    assert done.returncode == -9
    sweep(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (folder / "content").read_text() == ("old" if step < 2 else "new")


class TestWorkFolder:
    def test_it_goes_when_the_body_succeeds(self, tmp_path):
        with work_folder(tmp_path / "w", {"a": 1}) as work:
            (work / "x").touch()
        assert not (tmp_path / "w").exists()

    @pytest.mark.parametrize(
        "problem",
        [StorageError("no space left", "free some"), OSError(errno.ENOSPC, "full"), MemoryError(), KeyboardInterrupt()],
        ids=lambda problem: type(problem).__name__,
    )
    def test_what_another_try_can_finish_is_there_again_for_the_same_work(self, tmp_path, problem):
        with pytest.raises(type(problem)), work_folder(tmp_path / "w", {"a": 1, "b": [1, 2]}) as work:
            (work / "x").write_text("measured")
            raise problem
        with work_folder(tmp_path / "w", {"b": (1, 2), "a": 1}) as work:
            assert (work / "x").read_text() == "measured"

    def test_other_work_begins_anew(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "w", {"digest": "a"}) as work:
            (work / "x").touch()
            raise KeyboardInterrupt
        with work_folder(tmp_path / "w", {"digest": "b"}) as work:
            assert [entry.name for entry in work.iterdir()] == ["key.json"]

    def test_what_would_fail_again_leaves_nothing(self, tmp_path):
        with pytest.raises(UsageError), work_folder(tmp_path / "w", {"a": 1}) as work:
            (work / "x").touch()
            raise UsageError("no", "not so")
        assert not list(tmp_path.iterdir())

    def test_an_interrupt_before_anything_is_measured_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "w", {"a": 1}):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["{", "[1]", '{"a": 2}', ""])
    def test_a_damaged_key_is_another_key(self, tmp_path, content):
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "key.json").write_text(content)
        (tmp_path / "w" / "x").touch()
        with work_folder(tmp_path / "w", {"a": 1}) as work:
            assert not (work / "x").exists()

    def test_a_process_that_is_killed_leaves_it(self, tmp_path):
        script = (
            "import sys, time; from pathlib import Path; from fasc.storage import work_folder\n"
            "with work_folder(Path(sys.argv[1]), {'a': 1}) as work:\n"
            "    (work / 'x').write_text('measured'); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "w")])
        deadline = time.monotonic() + 60
        while not (tmp_path / "w" / "x").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        with work_folder(tmp_path / "w", {"a": 1}) as work:
            assert (work / "x").exists()


class TestJson:
    def test_what_is_written_is_read(self, tmp_path):
        value = {"ρ": [1, 2.5, None, "½"], "nested": {"a": True}}
        assert read_json(write_json(tmp_path / "x.json", value)) == value

    def test_a_byte_order_mark_is_no_matter(self, tmp_path):
        (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
        assert read_json(tmp_path / "x.json") == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b'{"a":\n 1,}', "line 2: not valid JSON"),
            (b"", "not valid JSON"),
            (b"\xff\xfe", "cannot read"),
            (b"[" * 100_000, "nested too deeply"),
            (b"[NaN]", "finite"),
            (b"[1e999]", "finite"),
            (b"9" * 10_000, "digits"),
        ],
        ids=["comma", "empty", "latin", "deep", "nan", "infinite", "digits"],
    )
    def test_what_is_no_json_of_ours_is_refused_in_one_line(self, tmp_path, content, words):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(StorageError, match=words) as refused:
            read_json(tmp_path / "x.json")
        assert "x.json" in refused.value.message

    def test_a_file_that_is_not_there_says_so(self, tmp_path):
        with pytest.raises(StorageError, match="does not exist"):
            read_json(tmp_path / "x.json")
        with pytest.raises(StorageError, match="cannot read"):
            read_json(tmp_path)


def test_storage_errors_say_what_the_system_said(tmp_path):
    assert "no space left" in storage_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path).message
    assert "no space left" in storage_error(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path).message
    assert "Permission denied" in storage_error(OSError(errno.EACCES, "Permission denied"), tmp_path).message
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_full(RuntimeError("something else"))


def test_a_write_that_cannot_fit_is_refused_with_both_numbers(tmp_path):
    require_free_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(StorageError, match=r"needs [\d,]{10,} MB and [\d,]+ MB are free"):
        require_free_space(tmp_path / "x", 10**18)


def test_the_cache_can_lie_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASC_CACHE", "~/cache")
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FASC_CACHE")
    assert cache_root().name == "fasc"
