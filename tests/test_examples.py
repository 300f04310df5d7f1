"""The examples that need no framework but timm. The others are in tests/frameworks."""

import os
from unittest.mock import patch

import by_hand
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from by_hand import as_rank, free_port, in_two_processes, run_example
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from rst import Linear

RISING = Linear(0.0, 1.0)


class EndedError(Exception):
    """In place of KeyboardInterrupt, which would end the tests."""


def run_interrupted(module, run, *example):
    """`run(*example)` until its second checkpoint, which it would write by `module.save`."""
    save, calls = module.save, []

    def save_once(*arguments, **options):
        if calls:
            raise EndedError
        calls.append(save(*arguments, **options))

    with patch.object(module, "save", save_once), pytest.raises(EndedError):
        run(*example)


def test_plain_resumes_where_it_was_interrupted(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    propagations, accuracy = run_example("plain.py", whole)
    assert propagations == by_hand.propagations(RISING, 32)
    assert accuracy > 0.8
    run_interrupted(torch, run_example, "plain.py", cut)
    assert run_example("plain.py", cut) == [propagations, accuracy]
    assert_same(torch.load(whole)["model"], torch.load(cut)["model"])


@pytest.mark.slow
def test_fine_tuning():
    propagations, accuracy = run_example("finetune.py", "test_vit")
    assert propagations == by_hand.propagations(RISING, 9)
    assert accuracy > 0.8


@pytest.mark.slow
def test_timm_script():
    words = ["--opt-kwargs", "base=sgd", "schedule=(0,1)", "rho=0.05", "--clip-grad", "1"]
    propagations, accuracy = run_example("timm_script.py", *words)
    assert propagations == by_hand.propagations(RISING, 18)
    assert accuracy > 0.5


def test_distributed_examples_in_one_process(tmp_path, monkeypatch):
    def run(*example):
        for name, value in as_rank(0, 1, free_port()).items():
            monkeypatch.setenv(name, value)
        return run_example(*example)

    propagations, accuracy = run("ddp.py")
    assert propagations == by_hand.propagations(RISING, 24)
    assert accuracy > 0.7
    propagations, accuracy = run("fsdp.py", tmp_path / "whole")
    assert propagations == by_hand.propagations(RISING, 24)
    assert accuracy > 0.8
    run_interrupted(dcp, run, "fsdp.py", tmp_path / "cut")
    dist.destroy_process_group()
    assert run("fsdp.py", tmp_path / "cut") == [propagations, accuracy]
    assert_same(*(weights_in(tmp_path / name) for name in ("whole", "cut")))


def weights_in(checkpoint):
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    return torch.load(file)["model"]


def run_distributed(folder):
    results = [run_example("ddp.py"), run_example("fsdp.py", folder / "checkpoint")]
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_distributed_examples_in_two_processes(tmp_path):
    in_two_processes(run_distributed, tmp_path)
    ddp, fsdp = torch.load(tmp_path / "0.pt")
    assert ddp[0] == by_hand.propagations(RISING, 12)
    assert fsdp[0] == by_hand.propagations(RISING, 24)
    assert ddp[1] > 0.6
    assert fsdp[1] > 0.8


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
