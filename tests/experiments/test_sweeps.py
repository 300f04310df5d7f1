"""Tables of conf/: every one under the small protocols, what a sweep stands for, and what is refused."""

import shlex
from itertools import chain
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from rst.experiments.command_line import describe
from rst.experiments.driver import _radii
from rst.experiments.sweeps import cells_of, expand, gather, options, read_table, split, with_outputs

CONF = ROOT / "conf"
SGD, SAM = {"label": "SGD", "overrides": ["method=sgd"]}, {"label": "SAM", "overrides": ["method=sam"]}


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def conf(tmp_path):
    """`conf(rows=[...])` writes a table t with these keys, and `settings` as what columns there are under
    protocol quick; it returns the folder."""

    def write(settings=None, **keys):
        table = {"title": "T", "reference": "SAM", "baseline": "SGD", "rows": [SGD, SAM], **keys}
        table = {key: value for key, value in table.items() if value is not None}
        for path, content in (("table/t", table), ("columns/quick", settings or {"one": {"digits": []}})):
            file = tmp_path / f"{path}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(yaml.safe_dump(content))
        return tmp_path

    return write


def rows_of(table):
    """Its rows, each with its column. If two of a column were one run, one method would have two names."""
    for column in table.columns:
        ids = list(chain.from_iterable(row.runs.values() for row in column.rows))
        assert len(set(ids)) == len(ids)
        yield from ((column, row) for row in column.rows)


@pytest.mark.slow
def test_every_table_under_a_small_protocol():
    """But those with results under it: tests/test_evidence.py composes them and compares with the records."""
    recorded = {path.parent.name for path in ROOT.glob("results/quick/*/table.csv")}
    tables, cells = gather(sorted({*options(CONF, "table")} - recorded), CONF, "quick", [])
    validating = {"pilot": 2, "tuning": 2, "scale_tuning": 1}
    for table in tables:
        for column, row in rows_of(table):
            assert column.split == ("validation" if table.name in validating else "test")
            assert list(row.units) == list(range({**validating, "scale": 5}.get(table.name, 10)))
            assert {cells[key].run.config["seed"]: key for key in row.runs.values()} == row.runs


def test_a_run_of_several_tables_is_one_run():
    (constant, overview), cells = gather(["constant", "overview"], CONF, "quick", ["seed=0"])
    assert overview.columns[0].rows[0].runs == constant.columns[0].rows[0].runs
    assert cells[constant.columns[0].rows[0].runs[0]].table == "constant"


def test_the_sharpness_of_all_rows_is_measured_at_the_baselines_radius():
    tables, cells = gather(["budget"], CONF, "quick", ["seed=0"])
    assert {cell.run.config["rho"] for cell in cells.values()} == {0.05, 0.1}
    assert _radii(tables, cells) == dict.fromkeys(cells, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["budget", "others", "precision", "scale"])
def test_parts_of_the_data_as_units(name):
    """SGD and SAM have two seeds on a part; a table and a column may have their own."""
    (table,), _ = gather([name], CONF, "folds", [])
    own = {"vit": range(2, 7), "bf16": range(2, 6), "fp32": range(2, 6), "scale": range(5)}
    for column, row in rows_of(table):
        parts = own.get(column.name or name)
        twice = row.label in ("SGD", "SAM") and parts is None
        assert {len(seeds) for seeds in row.units.values()} == {2 if twice else 1}
        assert sorted(row.units) == list(parts or range(2, 10))


@pytest.mark.parametrize("table", ["overview", "imagenet"])
def test_tables_under_the_papers_protocol(table):
    (found,), cells = gather([table], CONF, "paper", [])
    assert len(cells) == len(found.columns) * len(found.columns[0].rows) * 5
    expected = ("imagenet", 100, 0.05) if table == "imagenet" else ("cifar10", 200, 0.1)
    for cell in cells.values():
        config = cell.run.config
        rho = config["method"].get("rho", expected[2])
        assert (cell.run.choices["dataset"], config["epochs"], rho) == expected


@pytest.mark.parametrize("protocol", ["quick", "folds"])
def test_seeds_are_copies_of_what_hydra_composes(protocol):
    given = [f"protocol={protocol}", "method=grst", "schedule=linear", "schedule.p=0.25", "epochs=3"]
    first, second = cells_of([*given, "seed=3,1"])
    assert (first.run.config["seed"], second.run.config["seed"]) == (3, 1)
    assert second.run.config["dataset"].get("fold") == (1 if protocol == "folds" else None)
    cfg = compose("train", second.overrides, return_hydra_config=True)
    with open_dict(cfg):
        hydra_cfg = cfg.pop("hydra")
    assert second.run == describe(cfg, hydra_cfg)


def test_a_rows_command_makes_its_runs(conf, tmp_path, run_script):
    outputs = f"outputs={tmp_path / 'out'}"
    short = ["epochs=1", "model.width=4", "dataset.train_size=64", outputs]
    (table,), cells = gather(["t"], conf(seeds="0,1"), "quick", short)
    row = table.columns[0].rows[1]
    python, *command = shlex.split(row.command)
    assert python == "python"
    run_script(*command, outputs)
    folders = {path.parent for path in tmp_path.glob("out/*/result.json")}
    assert folders == {cells[key].run.folder for key in row.runs.values()} and len(folders) == 2


def test_expansion_names_the_values():
    assert expand("{a}-{c}", ["a=1,2", "b=x", "c=range(0,2)"], "t") == [
        (f"{a}-{c}", [f"a={a}", "b=x", f"c={c}"]) for a in (1, 2) for c in (0, 1)
    ]
    assert expand("none", [], "t") == [("none", [])]
    assert expand("list", ["a=[1,2]"], "t") == [("list", ["a=[1,2]"])]


def test_rows_and_columns_sweep(conf):
    row = {
        "label": "{schedule} at {schedule.p}",
        "overrides": ["schedule=linear,constant", "schedule.p=${grid.p}"],
    }
    columns = {
        "one": {"{augment}": ["augment=none,cutout"], "deep": ["model=resnet20"]},
        "grid": {"p": "0.1,0.2"},
    }
    spec, named = read_table(conf(columns, rows=[SGD, SAM, row], seeds="7,8"), "t", "quick")
    assert [row.label for row in spec.rows][2:] == [
        "linear at 0.1", "linear at 0.2", "constant at 0.1", "constant at 0.2",
    ]  # fmt: skip
    assert named == {"none": ["augment=none"], "cutout": ["augment=cutout"], "deep": ["model=resnet20"]}


def test_columns_need_names_of_their_own(conf):
    with pytest.raises(ValueError, match="two columns are called digits"):
        read_table(conf({"one": {"digits": ["augment=none,cutout"]}}), "t", "quick")


def test_seeds_are_those_given_else_the_tables_else_the_protocols(conf):
    def seeds(common, **keys):
        (table,), _ = gather(["t"], conf(**keys), "quick", common)
        return list(table.columns[0].rows[0].runs)

    assert seeds(["seed=5"], seeds="7,8") == [5]
    assert seeds([], seeds="7,8") == [7, 8]
    assert seeds([]) == list(range(10))


def test_a_seed_is_a_part_of_the_data_under_folds(conf):
    """SGD and SAM have two runs on each part, others one, which is paired with the mean of the two."""
    folder = conf(rows=[SGD, SAM, {"label": "RST", "overrides": ["method=rst"]}])
    (folder / "columns" / "folds.yaml").write_text((CONF / "columns" / "folds.yaml").read_text())
    (table,), cells = gather(["t"], folder, "folds", [])
    rows = {row.label: row for row in table.columns[0].rows}
    assert list(rows["SGD"].units) == list(rows["RST"].units) == list(range(2, 10))
    assert (len(rows["SGD"].runs), len(rows["RST"].runs)) == (16, 8)
    second, twelfth = (cells[run].run.config for run in rows["SGD"].units[2])
    assert (second["seed"], twelfth["seed"], twelfth["dataset"]["fold"]) == (2, 12, 12)
    assert (rows["SGD"].folds, rows["SAM"].folds) == (10, 10)
    assert "folds 10" in table.columns[0].setting and "fold 2" not in table.columns[0].setting


def test_seeds_on_one_part_are_no_parts(conf):
    folder = conf()
    (folder / "columns" / "cpu.yaml").write_text((CONF / "columns" / "cpu.yaml").read_text())
    (table,), _ = gather(["t"], folder, "cpu", ["dataset.folds=5", "dataset.fold=7"])
    assert {row.folds for row in table.columns[0].rows} == {None}  # seed 7's part is its number
    assert "fold 7" in table.columns[0].setting


@pytest.mark.parametrize("outputs", ["a=1, b", "müll/läufe", "it's [here]", "/scratch/plain-folder_1.0"])
def test_any_folder_can_hold_the_outputs(outputs):
    (cell,) = cells_of(with_outputs(["method=sgd"], Path(outputs)))
    assert cell.run.outputs == Path(outputs)


def test_without_a_protocols_seeds_there_is_one():
    (cell,) = cells_of(["method=sgd"])
    assert cell.run.config["seed"] == 0


def test_rows_of_more_or_fewer_epochs(conf):
    rows = [SGD, {"label": "longer", "overrides": ["method=sgd"], "epochs_factor": 1.5}, SAM]
    (table,), cells = gather(["t"], conf(rows=rows), "quick", ["epochs=5", "seed=0"])
    longer = table.columns[0].rows[1]
    assert longer.epochs_factor == 8 / 5  # rounded to whole epochs
    assert cells[longer.runs[0]].run.config["epochs"] == 8 and "epochs=8" in longer.command
    assert "5 epochs" in table.columns[0].setting
    rows[1] = {"label": "longer", "overrides": ["method=sgd", "epochs=15"]}
    (table,), _ = gather(["t"], conf(rows=rows, baseline="longer"), "quick", ["batch_size=32", "seed=0"])
    assert [row.epochs_factor for row in table.columns[0].rows] == [2, 1, 2]


def test_a_columns_seeds_come_before_a_rows_and_those_before_the_tables(conf):
    columns = {"one": {"a": ["seed=range(5,7)"], "b": []}}
    (table,), _ = gather(["t"], conf(columns, rows=[SGD, SAM | {"seeds": "3"}], seeds="1,2"), "quick", [])
    assert [[list(row.runs) for row in column.rows] for column in table.columns] == [
        [[5, 6], [5, 6]], [[1, 2], [3]],
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", ["quick", "cpu", "folds"])
def test_half_the_radius_is_half_the_protocols(protocol):
    spec, _ = read_table(CONF, "budget", protocol)
    (half,) = (row.overrides for row in spec.rows if row.label == "SAM at ρ/2")
    assert half == ["method=sam", f"rho={compose('train', [f'protocol={protocol}']).rho / 2:g}"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"colums": "all"}, "table t: Key 'colums' not in 'TableSpec'"),
        ({"rows": None}, "table t: .* missing mandatory value: rows"),
        ({"rows": [SGD, {**SAM, "overides": []}]}, "table t: Key 'overides' not in 'RowSpec'"),
        ({"rows": [SGD, {"label": "SAM"}]}, r"missing mandatory value: overrides full_key: table.rows\[1\]"),
        ({"rows": [SGD, SAM, SAM]}, "table t: two rows .* SAM"),
        ({"rows": [SGD]}, "table t: no row is labelled SAM; rows: SGD"),
        ({"rows": [SGD, {**SAM, "overrides": ["schedule.p=${grid.q}"]}]}, "table t: .*'grid.q' not found"),
        ({"columns": "two"}, "table t: columns must be one of one, got 'two'"),
        ({"rows": [SGD, {**SAM, "overrides": ["seed=range(0"]}]}, r"table t: cannot read 'seed=range\(0'"),
        ({"metrics": ["eta", "testerror"]}, "table t: unknown metrics testerror; choose from"),
        ({"rows": [SGD, {**SAM, "published": 4.2}]}, "row 'SAM': the published value 4.2 needs a source"),
        (
            {"rows": [SGD, {**SAM, "label": "SAM {schedule.p}"}]},
            "table t: 'SAM {schedule.p}' names {schedule.p}, which no override sets",
        ),
    ],
)
def test_a_contradictory_table_is_refused(conf, keys, message):
    with pytest.raises(ValueError, match=message):
        gather(["t"], conf(**keys), "quick", ["seed=0"])


def test_what_a_row_is_cannot_be_overridden():
    with pytest.raises(ValueError, match="its row SAM at ρ/2 has a rho of its own"):
        gather(["budget"], CONF, "quick", ["seed=0", "++rho=0.2"])


def test_an_added_seed_is_a_seed():
    (table,), _ = gather(["overview"], CONF, "quick", ["++seed=3,4"])
    assert [list(row.units) for row in table.columns[0].rows] == [[3, 4]] * len(table.columns[0].rows)


def test_what_tells_columns_apart_cannot_be_overridden():
    with pytest.raises(ValueError, match=r"two columns are the same, with dataset.label_noise=0.2"):
        gather(["label_noise"], CONF, "quick", ["dataset.label_noise=0.2"])


def test_settings_of_hydra_are_the_launchers():
    runs, of_hydra = ["epochs=1", "method.rho=1"], ["hydra.launcher.timeout_min=5", "+hydra.launcher.x=1"]
    assert split([*of_hydra, *runs]) == (runs, of_hydra)


def test_only_the_seed_may_sweep_beside_the_table():
    with pytest.raises(ValueError, match=r"only seed= may sweep here, not schedule.p=0.1,0.2"):
        cells_of(["protocol=quick", "schedule.p=0.1,0.2"])
    with pytest.raises(ValueError, match="seed must be a whole number"):
        cells_of(["protocol=quick", "seed=0,-1"])
