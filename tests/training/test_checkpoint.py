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
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(3.0))  # by anyone
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
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged \(Weights only load failed\)"):
        checkpoint.load(path, "id")
    assert not (tmp_path / "executed").exists()


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
    reason = "is missing" if damage == "gone" else "is damaged ("
    assert reason in caplog.records[0].message


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"w": torch.arange(200.0), "epoch": 3}, "id")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="its checksum differs"):
            checkpoint.load(path, "id")


def test_both_damaged(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_two(path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    message = r"checkpoint\.pt is damaged .* and .*checkpoint-previous\.pt is damaged .*remove"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "id")


@pytest.mark.parametrize(
    ("steps", "epochs", "minutes", "due"),
    [(None, None, None, []), (2, None, None, [2, 4, 6]), (None, 2, None, [6]), (4, 1, None, [3, 4, 6])],
)
def test_when_a_checkpoint_is_due(steps, epochs, minutes, due):
    """In two epochs of three steps, each followed by two batches of an evaluation."""
    every = checkpoint.Every(steps, epochs, minutes)
    found = []
    for step in range(1, 7):
        ends = [None] if step % 3 else [None, None, None, step // 3]
        found += [step for epoch in ends if every.is_due(step, epoch)]
    assert found == due


def test_a_checkpoint_is_due_minutes_after_the_last_one(monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    every = checkpoint.Every(None, None, every_minutes=2)
    found = []
    for step in range(1, 10):
        now += 50.0
        found += [step] if every.is_due(step, None) else []
    assert found == [3, 6, 9]
