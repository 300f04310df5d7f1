"""Under what a result was made."""

import shutil
import subprocess

import torch
from conftest import ROOT

from rst.training import provenance as module
from rst.training.provenance import _commit, combined, provenance


def test_provenance_names_versions_commit_and_machine():
    _commit.cache_clear()  # the checkout may have changed since the first test of this process
    made_with = provenance(torch.device("cpu"))
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert head.startswith(made_with["commit"])
    else:  # an unpacked archive
        assert made_with["commit"] is None
    assert made_with["versions"]["torch"] == torch.__version__
    assert made_with["device"] == "cpu"
    assert made_with["threads"] == torch.get_num_threads()
    assert made_with["host"] and made_with["device_name"]


def test_a_checkout_is_dirty_where_tracked_files_outside_results_changed(tmp_path, monkeypatch):
    code = tmp_path / "rst" / "training" / "provenance.py"
    code.parent.mkdir(parents=True)
    (tmp_path / "results").mkdir()
    table = tmp_path / "results" / "table.csv"
    for file in (code, table):
        file.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init"], ["add", "."], [*who, "commit", "--message=first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(module, "__file__", str(code))

    def is_dirty():
        return _commit.__wrapped__()["dirty"]  # not as it was at this process's start

    (tmp_path / "outputs").write_text("untracked")
    table.unlink()
    assert is_dirty() is False
    code.write_text("2")
    assert is_dirty() is True


def test_an_interrupted_run_names_all_commits_and_machines():
    parts = [
        {"commit": "a", "dirty": True, "host": "x", "device_name": "CPU", "ranks": "2", "threads": 1},
        {"commit": None, "dirty": None, "host": "y", "device_name": "CPU", "ranks": "2", "threads": 2},
        {"commit": "b", "dirty": False, "host": "x", "device_name": "CPU", "ranks": "1", "threads": 4},
    ]
    of_all = {"commit": "a+b", "dirty": True, "host": "x+y", "device_name": "CPU", "ranks": "2+1"}
    assert combined(parts) == {**of_all, "threads": 4}
    assert combined(parts[1:]) == {**of_all, "commit": "b", "dirty": False, "host": "y+x", "threads": 4}
    assert combined(parts[1:2]) == parts[1]
