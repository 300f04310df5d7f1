"""The benchmark: how it measures, and each section in small. No test depends on how long anything takes."""

import csv
import gc
import math
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import rst.optim
from rst.data import Augment, train_batches
from scripts.benchmark import __main__ as command
from scripts.benchmark.measuring import Ratio, interleaved, peak_bytes, ratio, timed
from scripts.benchmark.peers import optimizer_at, plain_loader, random_data
from scripts.benchmark.sections import METHODS, PEERS, SECTIONS, Problem, Settings

QUICK = Settings(rounds=1, quick=True, before=rst.optim.RST)


def test_measures_take_turns_and_none_always_follows_the_same_one():
    calls = []

    def measure(name):
        calls.append(name)
        return float(len(calls))

    rounds = interleaved({name: partial(measure, name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abc" + "acb" + "cab"
    assert rounds == [{"a": 4.0, "c": 5.0, "b": 6.0}, {"c": 7.0, "a": 8.0, "b": 9.0}]


def test_other_load_does_not_count_on_the_cpu():
    calls = []
    assert timed(lambda: calls.append(time.sleep(0.2)), repeat=2)() < 0.2 and len(calls) == 2


def test_no_garbage_is_collected_during_an_action_and_it_is_afterwards():
    collects = []
    interleaved({"a": lambda: collects.append(gc.isenabled()) or 0.0}, rounds=1)
    assert collects == [False, False] and gc.isenabled()


def test_a_ratio_is_taken_within_rounds():
    """In one round the machine is ten times slower."""
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 20.0, "b": 10.0}, {"a": 2.2, "b": 1.0}, {"a": 2.4, "b": 1.2}]
    measured = ratio("a / b", "setting", rounds, lambda seconds: seconds["a"] / seconds["b"])
    assert (measured.low, measured.median, measured.high) == pytest.approx((2.0, 2.0, 2.05))
    assert measured.rounds == 4


@pytest.mark.parametrize(
    ("median", "target", "reached"),
    [(1.03, "≤ 1.03", True), (1.0301, "≤ 1.03", False), (4.99, "≥ 5", False), (1.0, "", None)],
)
def test_targets(median, target, reached):
    assert Ratio("what", "setting", median, median, median, 3, target).reached is reached


def test_peak_memory_counts_what_is_held_at_once():
    def hold_two_of_three():
        torch.empty(1000)
        kept = torch.empty(1000)
        return torch.empty(1000), kept

    assert peak_bytes(hold_two_of_three) == 2 * 4000


@pytest.mark.parametrize("name", SECTIONS)
def test_sections(name):
    ratios = list(SECTIONS[name](QUICK))
    assert len({(r.what, r.setting) for r in ratios}) == len(ratios) > 0
    assert all(0 < r.low <= r.median <= r.high < math.inf for r in ratios)
    assert any(r.target for r in ratios)
    if name == "memory":  # beside two states of the random generator, 3 % of so small a model
        assert [r.median for r in ratios if r.target] == pytest.approx([1.0, 1.0], abs=0.05)
    if name == "steps":
        assert {f"{what}, after / before" for what in METHODS} < {r.what for r in ratios}


def test_every_sam_takes_the_same_steps():
    """In float64, in which orders of summation agree."""
    weights = []
    for start in [lambda p: p.method(METHODS["SAM"]), *(partial(Problem.peer, name=peer) for peer in PEERS)]:
        problem = Problem("resnet8", 4)
        problem.model.double()
        problem.images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
        problem.labels = torch.arange(4)
        step = start(problem)
        for _ in range(3):
            step()
        weights.append([p.detach() for p in problem.model.parameters()])
    assert not torch.equal(weights[0][0], next(Problem("resnet8", 4).model.parameters()).double())
    for peer in weights[1:]:
        torch.testing.assert_close(peer, weights[0], rtol=1e-7, atol=1e-9)


def test_both_loaders_give_the_same_images():
    data = random_data(32)
    ours, theirs = (
        next(iter(batches))[0]
        for batches in (
            train_batches(data, 32, Augment(), seed=0, epoch=0),
            plain_loader(data.train_images, data.train_labels, Augment(), 32),
        )
    )
    in_order = [batch[batch.flatten(1).sum(1).argsort()] for batch in (ours, theirs)]
    torch.testing.assert_close(*in_order, atol=1e-5, rtol=0)


def test_an_earlier_optimizer_comes_with_its_own_modules(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "rst").mkdir()
    (tmp_path / "rst" / "__init__.py").touch()
    (tmp_path / "rst" / "passes.py").write_text("ORIGIN = 'the commit'")
    (tmp_path / "rst" / "optim.py").write_text(
        "from rst.passes import ORIGIN\nclass RST:\n    origin = ORIGIN"
    )
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *arguments], check=True)
    today = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "rst"}
    assert optimizer_at("HEAD", tmp_path).origin == "the commit"
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] == "rst"} == today


def test_the_command_writes_a_page_and_a_csv(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--rounds", "1", "--sections", "data"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(command, "ROOT", tmp_path)
    command.main()
    page, records = sorted((tmp_path / "outputs" / "benchmark").iterdir(), reverse=True)
    rows = list(csv.DictReader(records.read_text().splitlines()))
    assert [row["section"] for row in rows] == ["data", "data"]
    assert all(row["what"] in page.read_text() for row in rows)
    assert not (tmp_path / "results").exists()  # a part must not replace the whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "nothing"], "'steps', 'memory', 'data', 'end_to_end'"),
        (["--against", "no-such-commit"], "no-such-commit"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_results_are_named_for_the_kind_of_machine():
    assert command.machine("Intel(R) Xeon(R) Processor (2 cores)") == "xeon-2core"
    assert command.machine("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz (8 cores)") == "core-i7-9700k-8core"
    assert command.machine("NVIDIA H200") == "h200"
