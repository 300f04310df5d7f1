"""A checkpoint is the old one or the new one, and no code."""

import pytest
import torch

from rst import files
from rst.training import checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert checkpoint.load(path, "id") is None
    state = {"model": {"w": torch.arange(3.0)}, "metrics": [{"epoch": 1, "loss": 0.5}]}
    checkpoint.save(path, state, "id")
    loaded = checkpoint.load(path, "id")
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["metrics"] == state["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_pickled_code_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"model": Payload()}, "id")
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt is damaged \(Weights only load failed\): remove it"
    ):
        checkpoint.load(path, "id")
    assert not (tmp_path / "executed").exists()


def test_anyone_can_read_it_without_code(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"w": torch.arange(3.0)}, "id")
    assert torch.equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["w"], torch.arange(3.0))


def write_two(path):
    for value in (1.0, 2.0):
        checkpoint.save(path, {"w": torch.full((1000,), value), "epoch": value}, "id")


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "garbage", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    path = tmp_path / "checkpoint.pt"
    write_two(path)
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":  # in the middle of a tensor: still a readable file
        place = content.index(torch.full((1,), 2.0).numpy().tobytes() * 100) + 50
        content[place] ^= 1
        path.write_bytes(content)
        assert not torch.equal(torch.load(path)["w"], torch.full((1000,), 2.0))
    elif damage == "gone":  # a crash between the two renamings of a save
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"abc"}[damage])
    loaded = checkpoint.load(path, "id")
    assert loaded["epoch"] == 1.0 and torch.equal(loaded["w"], torch.ones(1000))
    checkpoint.save(path, {"epoch": 3.0}, "id")  # which does not put the damaged one in the whole one's place
    path.unlink()
    assert checkpoint.load(path, "id")["epoch"] == 1.0
    record = caplog.records[0]
    reason = "is missing" if damage == "gone" else "is damaged ("
    assert reason in record.message and record.message.endswith("going on from the checkpoint before it")


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"w": torch.arange(200.0), "epoch": 3}, "id")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="its checksum differs"):
            checkpoint.load(path, "id")


@pytest.mark.parametrize("schema", [None, 2, 99])
def test_another_schema_is_refused(tmp_path, schema, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", schema)
    checkpoint.save(tmp_path / "checkpoint.pt", {}, "id")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"is of schema {schema}, and this version reads 1: go on with the"):
        checkpoint.load(tmp_path / "checkpoint.pt", "id")


def test_another_configurations_is_refused(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {}, "a1")
    with pytest.raises(ValueError, match=r"is of a run with another configuration \(a1, not b2\): remove it"):
        checkpoint.load(tmp_path / "checkpoint.pt", "b2")


def test_both_damaged(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_two(path)
    for one in tmp_path.iterdir():
        one.write_bytes(b"")
    message = r"checkpoint\.pt is damaged .* and .*checkpoint-previous\.pt is damaged .*: remove it"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "id")
