"""Small made-up runs, with numbers to be checked by hand."""

from rst.reporting.records import Finished, records_of
from rst.reporting.tables import Column, Row, Table

METHODS = ("sgd", "sam", "rst")
# Test errors in percent. RST is one point above SAM on average, and three below SGD with every seed.
ERRORS = {
    "sgd": [10.0, 11.0, 12.0, 13.0, 14.0],
    "sam": [7.0, 6.0, 8.0, 9.0, 10.0],
    "rst": [7.0, 8.0, 9.0, 10.0, 11.0],
}


def result(method, seed, error, **changes):
    """A result.json with this test error in percent."""
    p = {"sgd": 0.0, "sam": 1.0, "rst": 0.5}[method]
    sam_steps = {"sgd": 0, "sam": 600, "rst": 290 + seed}[method]
    values = {
        "schema": 1,
        "id": f"r{method}{seed}",
        "name": f"digits-resnet8-none-{method}-constant-s{seed}-r{method}{seed}",
        "command": f"python train.py method={method} seed={seed}",
        "choices": {"dataset": "digits", "model": "resnet8", "augment": "none", "method": method},
        "seed": seed,
        "epochs": 30,
        "steps": 600,
        "sam_steps": sam_steps,
        "propagations": 600 + sam_steps,
        "expected_propagations": 600 * (1 + p),
        "test_accuracy": 1 - error / 100,
        "best_test_accuracy": 1 - error / 100 + 0.01,
        "test_loss": 0.2 + p,
        "train_loss": 0.1,
        "seconds": {"train": 10.0 * (1 + p) + seed / 10, "total": 30.0},
        "peak_memory_bytes": 123456789,
        "versions": {"python": "3.11.7", "torch": "2.9.0", "cuda": None, "rst": "0.1.0"},
        "commit": "1234567",
        "dirty": False,
        "host": "box",
        "device": "cpu",
        "device_name": "Xeon (2 cores)",
        "threads": 1,
        "ranks": "1",
        "finished": "2026-11-21T22:00:00+00:00",
    }
    assert set(changes) <= set(values)
    return values | changes


def results(errors=ERRORS):
    return [result(method, seed, e) for method, row in errors.items() for seed, e in enumerate(row)]


def epochs(*errors):
    """The lines of a metrics.jsonl: four propagations an epoch; None where the error was not measured."""
    return [
        {"epoch": i + 1, "propagations": 4 * (i + 1), "train_loss": 1 / (i + 3), "train_accuracy": 0.5}
        | ({} if error is None else {"test_loss": 0.1 + 0.2, "test_accuracy": 1 - error / 100})
        for i, error in enumerate(errors)
    ]


def sharpness(of, **changes):
    values = {"loss": 0.1, "lambda_max": 40.0, "in_ball": 0.2, "along": 3.0, "rho": 0.1}
    how = {"images": 500, "directions": 3, "versions": {"torch": "2.9.0"}, "commit": "abc1234"}
    return values | how | {"host": "box", "id": of["id"], "finished": of["finished"]} | changes


def records(some=None, measured=()):
    """Of these results, with the sharpness of those whose method is in `measured`."""
    some = results() if some is None else some
    return records_of(
        Finished(one, epochs(50, None, 30), sharpness(one) if one["choices"]["method"] in measured else None)
        for one in some
    )


def column(name="", seeds=5, methods=METHODS, split="test"):
    rows = [
        Row(m.upper(), f"python train.py -m method={m}", {seed: f"r{m}{seed}" for seed in range(seeds)})
        for m in methods
    ]
    return Column(name, "A setting", rows, split)


def table(*columns, **changes):
    values = {"name": "small", "title": "A title", "reference": "SAM", "baseline": "SGD"} | changes
    return Table(columns=list(columns) or [column()], **values)
