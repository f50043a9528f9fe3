"""Where results go: nothing of the user's is replaced, and whatever cannot be written is refused before the work."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fasc.errors import StorageError
from fasc.outputs import (
    existing_paths,
    is_ours,
    output,
    require_output,
    require_own_file,
    resolved,
    write_artifact,
)
from fasc.reporting.drawing import save_png
from fasc.serving.checkpoint import require_own_checkpoint
from fasc.storage import sweep


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestResolved:
    def test_a_tilde_is_the_users_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolved("~/small") == tmp_path / "small"
        assert existing_paths(["~"]) == [tmp_path]

    def test_a_tilde_of_nobody_is_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert resolved("~nobody-has-this-name/x") == tmp_path / "~nobody-has-this-name" / "x"

    def test_a_link_is_what_it_leads_to(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "somewhere" / "else")
        assert resolved(tmp_path / "link") == tmp_path / "somewhere" / "else"

    def test_a_link_to_itself_is_refused(self, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(StorageError, match="leads nowhere"):
            resolved(tmp_path / "a")

    def test_the_working_folder_has_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert resolved(".") == resolved("") == tmp_path


def test_what_a_command_reads_is_found_among_names_and_lists(tmp_path):
    for name in ("a.txt", "b.txt", "c,d.txt"):
        (tmp_path / name).touch()
    given = [None, "wikitext2", "owner/model", f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'},facts", tmp_path / "c,d.txt", ""]
    assert existing_paths(given) == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c,d.txt"]


class TestRequireOutput:
    def test_a_place_that_is_free_is_taken_with_its_parents_not_yet_made(self, tmp_path):
        assert require_output(tmp_path / "a" / "b" / "c", overwrite=False) == tmp_path / "a" / "b" / "c"
        assert not (tmp_path / "a").exists()

    def test_what_exists_is_replaced_only_if_that_is_asked_for(self, tmp_path):
        file = tmp_path / "x"
        file.touch()
        with pytest.raises(StorageError, match="already exists") as refused:
            require_output(file, overwrite=False)
        assert "--overwrite" in refused.value.hint
        assert require_output(file, overwrite=True) == file

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
    def test_a_device_is_refused(self, device):
        with pytest.raises(StorageError, match="is a device"):
            require_output(device, overwrite=True)

    def test_a_pipe_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StorageError, match="is a device"):
            require_output(tmp_path / "pipe", overwrite=True)

    def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="is a folder, and the result is a file"):
            require_output(tmp_path, overwrite=True)
        with pytest.raises(StorageError, match="is a file, and the result is a folder"):
            require_output(tmp_path / "file", overwrite=True, folder=True)
        with pytest.raises(StorageError, match="`.*file` is a file"):
            require_output(tmp_path / "file" / "below", overwrite=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission_is_refused(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="no permission"):
            require_output(tmp_path / "x", overwrite=True)

    def test_an_input_is_never_the_output(self, tmp_path):
        """By its name, through a link, through a folder above it, under a hard link's other name."""
        (tmp_path / "texts").mkdir()
        corpus = tmp_path / "texts" / "mine.txt"
        corpus.write_text("precious")
        (tmp_path / "link.txt").symlink_to(corpus)
        os.link(corpus, tmp_path / "twin.txt")
        (tmp_path / "way").symlink_to(tmp_path / "texts")
        for target, folder in (
            (corpus, False),
            (tmp_path / "link.txt", False),
            (tmp_path / "twin.txt", False),
            (tmp_path / "way" / "mine.txt", False),
            (tmp_path / "texts" / ".." / "texts" / "mine.txt", False),
            (tmp_path / "texts", True),
            (tmp_path, True),
        ):
            with pytest.raises(StorageError, match="is or holds what the command reads"):
                require_output(target, overwrite=True, inputs=["self", f"facts,{corpus}"], folder=folder)
        assert require_output(tmp_path / "texts" / "new", overwrite=True, inputs=[corpus]) == tmp_path / "texts" / "new"

    def test_nothing_is_written_into_a_model_that_is_read(self, tmp_path):
        (tmp_path / "config.json").touch()
        with pytest.raises(StorageError, match="lies inside the model"):
            require_output(tmp_path / "small", overwrite=False, inputs=[tmp_path], folder=True)


class TestOwnership:
    def test_a_json_file_of_ours_is_replaced_and_no_other(self, tmp_path):
        ours = write_artifact(tmp_path / "ours.json", "plan", {"edits": []})
        assert require_own_file(ours) == ours
        for number, content in enumerate(
            ('{"name": "mine"}', "[1, 2]", "null", "not json", '{"written_by": "somebody"}', '{"written_by": 3}', "[" * 100_000)
        ):
            file = tmp_path / f"{number}.json"
            file.write_text(content)
            with pytest.raises(StorageError, match="was not written by fasc"):
                require_own_file(file)
            assert file.read_text() == content

    def test_a_file_that_is_no_text_is_not_ours(self, tmp_path):
        (tmp_path / "x.json").write_bytes(bytes(range(256)))
        with pytest.raises(StorageError, match="was not written by fasc"):
            require_own_file(tmp_path / "x.json")

    def test_an_empty_file_belongs_to_nobody(self, tmp_path):
        (tmp_path / "new.json").touch()
        assert require_own_file(tmp_path / "new.json")

    def test_figures_say_that_they_are_ours(self, tmp_path):
        figure = Figure()
        figure.subplots().plot([1, 2])
        figure.savefig(tmp_path / "photo.png")
        assert not is_ours(tmp_path / "photo.png")
        save_png(figure, tmp_path / "rho.png")
        assert is_ours(tmp_path / "rho.png")
        assert require_own_file(tmp_path / "rho.png")
        with pytest.raises(StorageError, match="was not written by fasc"):
            require_own_file(tmp_path / "photo.png")

    def test_tables_are_known_by_their_first_columns(self, tmp_path):
        (tmp_path / "ours.csv").write_text("group,block,kind,rho\na,0,q,0.5\n")
        (tmp_path / "mine.csv").write_text("name,salary\nme,1\n")
        assert is_ours(tmp_path / "ours.csv")
        assert not is_ours(tmp_path / "mine.csv")

    def test_a_folder_is_replaced_only_if_everything_in_it_is_ours(self, tmp_path):
        folder = tmp_path / "small"
        folder.mkdir()
        require_own_checkpoint(folder)  # empty
        (folder / "config.json").write_text("{}")
        with pytest.raises(StorageError, match="no checkpoint that fasc wrote"):
            require_own_checkpoint(folder)
        write_artifact(folder / "fasc_provenance.json", "x", {"files": ["config.json", "fasc_provenance.json"]})
        require_own_checkpoint(folder)
        (folder / "notes.txt").write_text("precious")
        with pytest.raises(StorageError, match=r"holds `notes\.txt`, which fasc did not write"):
            require_own_checkpoint(folder)

    def test_the_folder_is_looked_at_before_the_work(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("precious")
        with pytest.raises(StorageError, match="no checkpoint that fasc wrote"):
            require_output(tmp_path / "mine", overwrite=True, folder=True, owned=require_own_checkpoint)


HOLD = """
import sys, time
from pathlib import Path
from fasc.outputs import output
with output(sys.argv[1], overwrite=True) as target:
    Path(sys.argv[1] + ".held").touch()
    time.sleep(60)
"""


class TestLock:
    def test_of_two_calls_at_once_the_second_says_that_the_first_is_at_work(self, tmp_path):
        with output(tmp_path / "x", overwrite=True):
            with (
                pytest.raises(StorageError, match="another process is writing") as refused,
                output(tmp_path / "x", overwrite=True),
            ):
                pytest.fail("both are at work")
            assert "wait" in refused.value.hint

    def test_calls_with_other_results_do_not_wait_for_each_other(self, tmp_path):
        with output(tmp_path / "x", overwrite=True) as one, output(tmp_path / "y", overwrite=True) as other:
            assert one != other

    def test_through_a_link_it_is_the_same_result(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "x")
        second = output(tmp_path / "link", overwrite=True)
        with output(tmp_path / "x", overwrite=True), pytest.raises(StorageError, match="another process is writing"), second:
            pytest.fail("both are at work")

    def test_nothing_is_left_of_it_whether_the_work_succeeds_or_not(self, tmp_path):
        with output(tmp_path / "x", overwrite=True):
            assert [file.name for file in tmp_path.iterdir()] == [".x.lock"]
        with pytest.raises(KeyboardInterrupt), output(tmp_path / "x", overwrite=True):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    def test_a_process_that_is_killed_holds_nobody_up(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "x")])
        deadline = time.monotonic() + 60
        while not (tmp_path / "x.held").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            with pytest.raises(StorageError, match="another process is writing"), output(tmp_path / "x", overwrite=True):
                pass
        finally:
            process.kill()
            process.wait()
        assert (tmp_path / ".x.lock").exists(), "it had no time to tidy up"
        with output(tmp_path / "x", overwrite=True) as target:
            assert target == tmp_path / "x"
        assert [file.name for file in tmp_path.iterdir()] == ["x.held"]

    def test_a_result_that_appears_before_the_lock_is_held_is_seen(self, tmp_path, monkeypatch):
        """The other call has just finished: its result is not replaced without being asked."""
        from fasc import outputs

        real = outputs._lock

        def late(file):
            (tmp_path / "x").write_text("the other's")
            return real(file)

        monkeypatch.setattr(outputs, "_lock", late)
        with pytest.raises(StorageError, match="already exists"), output(tmp_path / "x", overwrite=False):
            pytest.fail("there is a result already")
        assert (tmp_path / "x").read_text() == "the other's"

    def test_a_lock_that_its_owner_has_just_removed_is_no_lock(self, tmp_path, monkeypatch):
        """Opened before the owner removed it and locked afterwards: a third call would lock another file of that name."""
        from fasc import outputs

        real, opened = outputs.fcntl.flock, []

        def flock(lock, how):
            if not opened:
                (tmp_path / ".x.lock").unlink()
            opened.append(os.fstat(lock.fileno()).st_ino)
            real(lock, how)

        monkeypatch.setattr(outputs.fcntl, "flock", flock)
        with output(tmp_path / "x", overwrite=True):
            assert len(opened) == 2
            assert (tmp_path / ".x.lock").stat().st_ino == opened[-1]


def test_litter_of_processes_that_were_killed_is_swept_by_the_next_call(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.partial-{dead.pid}-abc").mkdir()
    (tmp_path / f".x.partial-{dead.pid}-abc" / "model.safetensors").touch()
    (tmp_path / f".x.partial-{dead.pid}").touch()
    (tmp_path / f".x.old-{dead.pid}-abc").mkdir()
    others = [f".x.partial-{os.getpid()}-abc", f".y.partial-{dead.pid}", ".x.partialities", "x.partial-1", ".x.work"]
    for name in (*others, "x"):
        (tmp_path / name).touch()
    with output(tmp_path / "x", overwrite=True):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {*others, "x"}


def test_a_name_with_the_letters_of_patterns_sweeps_its_own_litter_alone(tmp_path):
    (tmp_path / ".x[1].partial-999999").touch()
    (tmp_path / ".x1.partial-999999").touch()
    sweep(tmp_path / "x[1]")
    assert [file.name for file in tmp_path.iterdir()] == [".x1.partial-999999"]


def test_an_old_result_is_put_back_if_the_process_that_replaced_it_was_killed_in_between(tmp_path):
    old = tmp_path / ".small.old-999999-abc"
    old.mkdir()
    (old / "config.json").write_text("the old one")
    (tmp_path / ".small.partial-999999-abc").mkdir()
    with pytest.raises(StorageError, match="already exists"), output(tmp_path / "small", overwrite=False, folder=True):
        pytest.fail("the old result is there again")
    assert bytes_of(tmp_path) == {Path("small/config.json"): b"the old one"}


def test_json_of_ours_says_what_it_is(tmp_path):
    write_artifact(tmp_path / "x.json", "plan", {"edits": [1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"written_by": "fasc plan", "edits": [1]}


@pytest.mark.parametrize("work_is_older", [True, False])
def test_a_refused_call_clears_what_a_kill_left_and_keeps_work_that_is_not_done(tmp_path, work_is_older):
    """A call that was killed after its result stood has left a lock and its work; one that was to replace it has not finished."""
    out, work, lock = tmp_path / "small", tmp_path / ".small.work", tmp_path / ".small.lock"
    for folder in (work, out) if work_is_older else (out, work):
        folder.mkdir()
        (folder / "key.json").write_text("{}", encoding="utf-8")
        moment = 1_000_000_000 + (folder == (out if work_is_older else work))
        os.utime(folder / "key.json", (moment, moment))
        os.utime(folder, (moment, moment))
    lock.touch()
    with pytest.raises(StorageError, match="already exists"), output(out, overwrite=False, folder=True):
        pass
    assert out.is_dir()
    assert not lock.exists()
    assert work.exists() is not work_is_older
