"""The command in this process, and what every refusal looks like."""

import sys

import pytest

from fasc.cli.app import main

CALIBRATION = ["--sequences", "20", "--sequence-length", "16"]


@pytest.fixture
def fasc(monkeypatch, capsys):
    """Run the command in this process; give back (exit code, stdout, stderr)."""
    monkeypatch.setattr("fasc.cli.app.INTERRUPT.install", lambda: None)  # pytest keeps its own Ctrl-C

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fasc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def done(fasc):
    """Run the command, which must succeed; give back stdout and stderr."""

    def call(*arguments):
        code, out, err = fasc(*arguments)
        assert code == 0, err
        return out, err

    return call


def refused(result, *words):
    """Exit code 2, one error line with these words, one hint line, no traceback; gives back the lines of stderr."""
    code, _, err = result
    assert code == 2, err
    lines = err.strip().splitlines()
    assert lines[-2].startswith("error: "), err
    assert lines[-1].startswith("hint: "), err
    assert len(lines[-1]) > len("hint: ")
    assert "Traceback" not in err
    assert "internal error" not in err
    for word in words:
        assert word in "\n".join(lines[-2:]), err
    return lines


@pytest.fixture
def compressed(done, model_folder, text_file, tmp_path):
    """A checkpoint at half rank."""
    out = tmp_path / "compressed"
    done(
        "compress", model_folder, "--rank-fraction", "0.5", "--corpus", text_file, *CALIBRATION, "--damping", "1e-3", "--out", out
    )
    return out


@pytest.fixture
def statistics(done, model_folder, text_file, tmp_path):
    """A file of the moments of the default methods."""
    file = tmp_path / "statistics.safetensors"
    done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--out", file)
    return file


@pytest.fixture
def places(tmp_path):
    """A device map that leaves the last block of the tiny model on disk."""
    file = tmp_path / "places.json"
    file.write_text('{"": "cpu", "model.layers.1": "disk"}')
    return file
