"""The benchmark measures what it says: how it takes turns and rounds, that its peers compute the same, and
each section in small. No test looks at how long something took."""

import csv
import gc
import math
import multiprocessing
import os
import re
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy import stats
from torch.utils.data import DataLoader

sys.path.insert(0, str(ROOT / "scripts"))
import benchmark
import benchmark_peers as peers
import benchmark_suite as suite
import benchmark_update as update

from rst.benchmark import Figure, Settings, figure, interleaved, per_step, slope
from rst.data import Augment, train_batches

QUICK = Settings(rounds=2, quick=True)


def parse(markdown):
    """The cells of its tables' rows."""
    lines = [line for line in markdown.splitlines() if line.startswith("|") and "---" not in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "what"]


EXPECTED = {
    "steps": {"SGD / its limit", "SAM / its limit", "RST p=0.5 / its limit", "RST p=0.5 (engine) / its limit"}
    | {"G-RST p=0.5 / RST p=0.5", "SAM / SAM, pytorch_optimizer", "SAM / SAM, as usually written"},
    "perturbation": {f"ours / {peer}" for peer in ("pytorch_optimizer", "as usually written")},
    "memory": {"RST p=0.5, beyond SGD", "G-RST p=0.5, beyond SGD that keeps gradients"},
    "data": {f"{name} / PIL" for name in ("none", "shift", "basic", "cutout", "autoaugment", "mixup")}
    | {"mixup_cutout / PIL", "autoaugment_mixup_cutout / PIL"},
    "end_to_end": {f"ours, {precision} / plain recipe" for precision in ("fp32", "bf16")}
    | {f"share of waiting for data, {precision}" for precision in ("fp32", "bf16")},
    "sweep": {"1 processes / 1 threads"},
    "start": {
        "seconds of train.py --help",
        "train.py --help / import torch",
        "share of wall time in training",
    },
    "growth": {"RST p=0.5 / its limit", "exponent of perturb + restore in parameters"},
    "planning": {"exponent of plan", "exponent of tables, more seeds", "exponent of tables, more rows"},
}


# The copy θ + ε. G-RST keeps ∇L(θ) besides, as SGD may.
EXACT = {
    "RST p=0.5, beyond SGD": 1.0,
    "G-RST p=0.5, beyond SGD that keeps gradients": 1.0,
}


def test_every_section_is_tested():
    assert EXPECTED.keys() == benchmark.SECTIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_section(name, tmp_path):
    figures = benchmark.measure([name], QUICK)
    assert {one.what for one in figures} >= EXPECTED[name]
    assert len({(one.what, one.model) for one in figures}) == len(figures)
    for one in figures:
        assert one.section == name and one.rounds >= 1
        assert all(math.isfinite(value) for value in (one.low, one.ratio, one.high))
        assert one.low <= one.ratio <= one.high
        # An exponent of tiny sizes is noise around 0; memory beyond a baseline can be none.
        assert one.ratio > 0 or "exponent" in one.what or name == "memory"
        assert one.reached in (("yes", "no") if one.target else ("",))
        assert one.ratio == EXACT.get(one.what, one.ratio)

    made_with = {"host": "box", "device_name": "CPU", "threads": 1, "commit": "abc", "dirty": True}
    markdown = benchmark.to_markdown(
        figures, made_with | {"versions": {"torch": "2", "python": "3"}}, "make benchmark"
    )
    assert "box" in markdown and "abc, uncommitted changes" in markdown and "`make benchmark`" in markdown
    rows = list(csv.DictReader(benchmark.to_csv(figures).splitlines()))
    assert [*rows[0]] == ["section", "what", "model", "ratio", "low", "high", "rounds", "target", "reached"]
    assert len(parse(markdown)) == len(rows) == len(figures)
    for (what, model, ratio, _, rounds, target, reached), row, one in zip(
        parse(markdown), rows, figures, strict=True
    ):
        assert [what, model, rounds, target, reached] == [
            row[key] for key in ("what", "model", "rounds", "target", "reached")
        ]
        assert float(row["ratio"]) == one.ratio and abs(float(ratio) - one.ratio) <= 1e-3


def with_a_worker():
    batches = iter(DataLoader(range(8), num_workers=1))

    def workers():
        next(batches)
        return [child.pid for child in multiprocessing.active_children()]

    return workers


@pytest.mark.slow
def test_a_server_takes_its_loaders_workers_along():
    with suite._server(with_a_worker, 1) as server:
        assert server.recv() == "ready"
        server.send(True)
        (worker,) = server.recv()
        os.kill(worker, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_command_writes_both_files_and_a_part_not_over_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "--quick", "--sections", "perturbation", "--rounds", "1"]
    )
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    benchmark.main()
    paths = list((tmp_path / "outputs" / "results" / "benchmark").iterdir())
    assert (
        sorted(path.suffix for path in paths) == [".csv", ".md"] and len({path.stem for path in paths}) == 1
    )
    assert not (tmp_path / "results").exists()
    assert "ours / pytorch_optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "steps,nothing"], "unknown section nothing: choose from steps"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


def test_actions_take_turns():
    calls, collecting = [], []

    def act(name):
        calls.append(name)
        collecting.append(gc.isenabled())
        return float(len(calls))

    assert gc.isenabled()
    rounds = interleaved({name: lambda name=name: act(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [list(one) for one in rounds] == [["a", "b", "c"]] * 3
    assert [one["a"] for one in rounds] == [6.0, 8.0, 10.0]  # what it returned
    assert not any(collecting) and gc.isenabled()


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_preparation_is_not_measured():
    calls = []
    action = per_step(lambda: calls.append("step"), 3, prepare=lambda: torch.zeros(10**7).add_(1).sum())
    assert action() < 1e-3 and calls == ["step"] * 3


def test_a_figure_is_of_each_rounds_ratio():
    """Where the machine is ten times slower in a round, its ratio is what it is in the others."""
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 2.0}, {"a": 20.0, "b": 10.0}, {"a": 6.0, "b": 3.0}]
    one = figure("s", "w", "m", rounds, lambda one: one["a"] / one["b"])
    assert (one.low, one.ratio, one.high, one.rounds) == (2.0, 2.0, 2.0, 4)
    one = figure("s", "w", "m", [{"a": a} for a in (1.0, 2.0, 3.0, 4.0, 5.0)], lambda one: one["a"])
    assert (one.low, one.ratio, one.high) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("ratio", "target", "reached", "shown"),
    [
        (1.03, "≤ 1.03", "yes", "1.030"),
        (1.0300001, "≤ 1.03", "no", "1.031"),
        (1.0, "≤ 1.0", "yes", "1.000"),
        (4.9999, "≥ 5", "no", "4.999"),
        (5.0, "≥ 5", "yes", "5.000"),
        (0.03, "< 0.03", "no", "0.030"),
        (0.02951, "< 0.03", "yes", "0.030"),
        (1.2345, "", "", "1.234"),
    ],
)
def test_no_rounding_in_our_favour(ratio, target, reached, shown):
    one = Figure("s", "w", "m", ratio, ratio, ratio, 3, target)
    assert one.reached == reached
    assert benchmark.shown(one) == shown


def test_slope_of_a_power_law():
    sizes = [100, 1000, 10_000]
    assert slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_limits():
    one = {"propagation": 10.0, "update": 1.0, "SGD (engine)": 12.0}
    limits = {
        "SGD": 11.0,
        "SAM": 21.0,
        "RST p=0.5": 16.0,
        "G-RST p=0.5": 16.0,
        "SAM, pytorch_optimizer": 21.0,
    }
    limits |= {"SAM (engine)": 22.0, "RST p=0.5 (engine)": 17.0}
    for what, limit in limits.items():
        assert update.to_limit(what)(one | {what: 1.5 * limit}) == pytest.approx(1.5)


def problem():
    """In float64, where different orders of summation agree."""
    one = update.Problem("resnet8", 8, width=4)
    one.model.double()
    one.images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    one.labels = torch.arange(8)
    return one


def test_every_sam_computes_the_same():
    ours, usual, peer, foreach = (problem() for _ in range(4))
    steps = [ours.rst(update.SAM), usual.usual(), peer.peer(), foreach.peer(foreach=True)]
    before = [p.detach().clone() for p in ours.model.parameters()]
    for step in steps:
        for _ in range(4):
            step()
    weights = [[p.detach() for p in one.model.parameters()] for one in (ours, usual, peer, foreach)]
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], before, strict=True))
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=1e-7, atol=1e-9)


def test_between_passes_all_come_back_to_the_weights():
    one = update.Problem("resnet8", 1, width=4)
    before = [p.detach().clone() for p in one.model.parameters()]
    for action in update.between_passes(one).values():
        assert action() > 0
        assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))


def test_augmentations_are_those_of_images_in_memory():
    found = suite.augmentations()
    files = {path.stem for path in (ROOT / "conf" / "augment").glob("*.yaml")}
    assert files - found.keys() == {"inception"}
    assert found["cutout"] == Augment(flip=True, crop_padding=4, cutout=16)


IN_MEMORY = {path.stem for path in (ROOT / "conf" / "augment").glob("*.yaml")} - {"inception"}


@pytest.mark.parametrize("name", sorted(IN_MEMORY))
def test_both_pipelines_give_batches_of_one_kind(name):
    augment = suite.augmentations()[name]
    data = update.random_data(32)
    ours, _ = next(train_batches(data, 16, augment, seed=0, epoch=0))
    usual = peers.UsualImages(data.train_images, data.train_labels, augment)
    theirs = next(peers.usual_batches(usual, 16, augment.mixup))[0]
    assert ours.shape == theirs.shape == (16, 3, 32, 32) and ours.dtype == theirs.dtype == torch.float32


def test_both_pipelines_normalize_alike():
    data = update.random_data(32)
    usual = peers.UsualImages(data.train_images, data.train_labels, Augment())
    batches = [
        next(train_batches(data, 32, Augment(), seed=0, epoch=0)),
        next(peers.usual_batches(usual, 32)),
    ]
    key = torch.randn(3 * 32 * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (x[(x.flatten(1).double() @ key).argsort()] for x, _ in batches)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def outcomes(batches, draws, keep):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  that is where the usual cutout draws from
    return torch.cat([keep(next(batches)) for _ in range(draws)])


def test_both_pipelines_flip_crop_and_cut_alike():
    """Of one image with a different value in each pixel, many copies: which of the 2·9·9 flips and crops each
    became, and how many pixels were cut from it. Chance of a false alarm: 1e-6 for each of the two."""
    n, size = 4000, 200
    data = update.random_data(size)
    pixels = torch.arange(1024).view(32, 32)
    image = torch.stack([pixels % 256, pixels // 256 + 1, torch.full((32, 32), 255)]).byte()
    data.train_images[:] = image
    augment = Augment(flip=True, crop_padding=4, cutout=16)
    usual = peers.UsualImages(data.train_images, data.train_labels, augment)

    def decode(batch):
        """Pixel numbers, −1 where cut, of [B, 3, 32, 32]."""
        mean, std = torch.tensor(peers.MEAN)[:, None, None], torch.tensor(peers.STD)[:, None, None]
        values = ((batch * std + mean) * 255).round()
        return torch.where(batch[:, 2] == 0, -1, values[:, 0] + 256 * (values[:, 1] - 1)).long()

    ours = torch.cat(
        [
            decode(x)
            for epoch in range(n // size)
            for x, _ in train_batches(data, size, augment, seed=0, epoch=epoch)
        ]
    )
    theirs = outcomes(peers.usual_batches(usual, size), n // size, lambda batch: decode(batch[0]))

    padded = torch.nn.functional.pad(pixels[None, None].float(), (4, 4, 4, 4), mode="reflect")[0, 0].long()
    crops = {}
    for top, left in product(range(9), range(9)):
        crop = padded[top : top + 32, left : left + 32]
        crops[tuple(crop[::10, ::10].flatten().tolist())] = len(crops)
        crops[tuple(crop.flip(1)[::10, ::10].flatten().tolist())] = len(crops)
    assert len(crops) == 162
    table = torch.tensor(list(crops))  # [162, 16]

    def which(found):
        """The one flip and crop that agrees with all that was not cut."""
        seen = found[:, ::10, ::10].flatten(1)
        agrees = ((seen[:, None] == table) | (seen[:, None] < 0)).all(2)
        assert agrees.any(1).all()
        return agrees.float().argmax(1)[agrees.sum(1) == 1]

    counts = np.array([np.bincount(which(found), minlength=162) for found in (ours, theirs)])
    assert stats.chi2_contingency(counts).pvalue > 1e-6
    cut = np.array(
        [(found < 0).flatten(1).sum(1).bincount(minlength=257).numpy() for found in (ours, theirs)]
    )
    cut = cut[:, cut.sum(0) > 0]
    assert stats.chi2_contingency(cut).pvalue > 1e-6
    assert torch.equal(((ours < 0).flatten(1).sum(1)).max(), ((theirs < 0).flatten(1).sum(1)).max())


def test_wall_time_of_a_recorded_sweep():
    """Two lanes of three runs, ten seconds each, a second apart."""
    ends = [pd.Timestamp(2026, 1, 1, tz="UTC") + pd.Timedelta(seconds=s) for s in (10, 11, 20, 21, 30, 31)]
    frame = pd.DataFrame({"finished": [end.isoformat() for end in ends], "seconds.total": 10.0})
    assert suite.spent(frame) == (31.0, 2)


def test_the_make_target_calls_it():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^benchmark: .*\n\t.*scripts/benchmark\.py", makefile, re.MULTILINE)
