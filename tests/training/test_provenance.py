"""Under what a result was made."""

import shutil
import subprocess

import torch
from conftest import ROOT

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


def test_an_interrupted_run_names_all_commits_and_numbers_of_ranks():
    parts = [
        {"commit": "a", "ranks": "2", "host": "x"},
        {"commit": None, "ranks": "2", "host": "y"},
        {"commit": "b", "ranks": "1", "host": "z"},
    ]
    assert combined(parts) == {"commit": "a+b", "ranks": "2+1", "host": "z"}
    assert combined(parts[1:2]) == {"commit": None, "ranks": "2", "host": "y"}
