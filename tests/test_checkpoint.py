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
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged \(.*\): remove it"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


def write_two(path):
    for value in (1.0, 2.0):
        checkpoint.save(path, {"w": torch.full((1000,), value), "epoch": value})


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
    loaded = checkpoint.load(path)
    assert loaded["epoch"] == 1.0 and torch.equal(loaded["w"], torch.ones(1000))
    (record,) = caplog.records
    reason = "is missing" if damage == "gone" else "is damaged ("
    assert reason in record.message and record.message.endswith("going on from the checkpoint before it")


def test_a_flipped_byte_anywhere_changes_nothing_unnoticed(tmp_path):
    """Of 300 places over the file: either the checkpoint is refused or what it holds is what was saved."""
    path = tmp_path / "checkpoint.pt"
    state = {"w": torch.arange(200.0), "epoch": 3}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            loaded = checkpoint.load(path)
        except ValueError:
            refused += 1
            continue
        assert loaded["epoch"] == 3 and torch.equal(loaded["w"], state["w"]), place
    assert refused > 50


def test_both_damaged(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_two(path)
    for one in tmp_path.iterdir():
        one.write_bytes(b"")
    message = r"checkpoint\.pt is damaged .* and .*checkpoint-previous\.pt is damaged .*: remove it"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)
