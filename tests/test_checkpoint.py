"""A checkpoint is the old one or the new one, and no code."""

import pytest
import torch

from rst import checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert checkpoint.load(path) is None
    state = {"model": {"w": torch.arange(3.0)}, "metrics": [{"epoch": 1, "loss": 0.5}]}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["metrics"] == state["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_pickled_code_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Payload()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged: remove it"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()
