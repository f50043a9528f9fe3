"""``fasc recover``."""

import json

from tests.cli.conftest import refused

TRAINING = ["--sequences", "32", "--sequence-length", "16", "--batch-tokens", "64", "--learning-rate", "3e-3"]


def test_a_compressed_model_is_trained_towards_the_dense_one(fasc, done, compressed, text_file, tmp_path):
    out = tmp_path / "recovered"
    shown, _ = done("recover", compressed, "--corpus", text_file, *TRAINING, "--out", out)
    said, path = shown.strip().splitlines()
    assert path == str(out)
    before, after = (float(number) for number in said.partition(": ")[2].partition(" nats")[0].split(" → "))
    assert after < before
    made = json.loads((out / "fasc_provenance.json").read_text())
    assert made["recovery"]["tokens"] == 32 * 16
    refused(fasc("recover", compressed, "--corpus", text_file, *TRAINING, "--out", out), "already exists")
    refused(fasc("recover", compressed, "--out", compressed, "--overwrite"), "what the command reads")
    assert {file.name for file in tmp_path.iterdir()} == {"compressed", "recovered", "text.txt"}
