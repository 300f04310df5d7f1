"""Table specifications: every one under every protocol, what a sweep stands for, and what is refused."""

import itertools

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from rst.experiments.command_line import describe
from rst.experiments.sweeps import cells, cells_of, expand, options, read_specification

CONF = ROOT / "conf"
PROTOCOLS, TABLES = options(CONF, "protocol"), options(CONF, "table")


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def spec_of(tmp_path):
    """`spec_of(rows=[...])` reads a table of these keys, under a protocol of these `settings`."""

    def read(settings=None, **keys):
        for group, name, content in (
            ("table", "t", {"title": "T", "reference": "SAM", "baseline": "SGD", **keys}),
            ("columns", "p", settings or {"one": [[]]}),
        ):
            (tmp_path / group).mkdir(exist_ok=True)
            (tmp_path / group / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return read_specification(tmp_path, "t", "p")

    return read


SGD, SAM = {"label": "SGD", "overrides": ["method=sgd"]}, {"label": "SAM", "overrides": ["method=sam"]}


def test_there_are_the_tables_that_the_readme_names():
    assert set(TABLES) >= {"overview", "constant", "schedules", "methods", "gamma", "imagenet"}
    assert options(CONF, "columns") == PROTOCOLS


@pytest.mark.parametrize(("protocol", "table"), [*itertools.product(("quick", "cpu"), TABLES)])
def test_every_table_under_the_small_protocols(protocol, table):
    spec = read_specification(CONF, table, protocol)
    seen = {}
    seeds = [0, 1] if table == "pilot" else list(range({"quick": 10, "cpu": 8}[protocol]))
    for column, row, found in cells(spec, CONF, protocol, []):
        assert [cell.seed for cell in found] == seeds
        for cell in found:
            # Two rows of a column that are one run would be one method under two names.
            assert seen.setdefault((tuple(column), cell.run.id), row.label) == row.label
    assert len(seen) == len(spec.columns) * len(spec.rows) * len(seeds)


@pytest.mark.parametrize("table", ["constant", "imagenet"])
def test_tables_under_the_papers_protocol(table):
    spec = read_specification(CONF, table, "paper")
    found = [
        (column, row, cell) for column, row, row_cells in cells(spec, CONF, "paper", []) for cell in row_cells
    ]
    assert len(found) == len(spec.columns) * len(spec.rows) * 5
    for _, _, cell in found:
        expected = ("imagenet", 100, 0.05) if table == "imagenet" else ("cifar10", 200, 0.1)
        config = cell.run.config
        rho = config["method"].get("rho", expected[2])
        assert (cell.run.choices["dataset"], config["epochs"], rho) == expected


@pytest.mark.parametrize(
    ("protocol", "grid"),
    [("quick", [tenth / 10 for tenth in range(1, 10)]), ("cpu", [0.25, 0.5, 0.75])],
)
def test_the_constant_table_is_sgd_to_sam_in_the_protocols_steps(protocol, grid):
    spec = read_specification(CONF, "constant", protocol)
    assert (spec.baseline, spec.reference) == ("p = 0 (SGD)", "p = 1 (SAM)")
    assert [row.label for row in spec.rows] == [spec.baseline, *(f"p = {p}" for p in grid), spec.reference]
    found = {row.label: row_cells[0].run for _, row, row_cells in cells(spec, CONF, protocol, [])}
    assert (
        found[spec.baseline].choices["method"] == "sgd" and found[spec.reference].choices["method"] == "sam"
    )
    assert [found[f"p = {p}"].config["schedule"]["p"] for p in grid] == grid


def test_a_cell_is_what_hydra_composes():
    """The short cuts (one composition for many values, seeds put in afterwards) change nothing."""
    overrides = [
        "protocol=quick",
        "method=grst",
        "schedule=linear",
        "schedule.p=0.25",
        "method.gamma=2",
        "epochs=3",
    ]
    for cell in cells_of([*overrides, "seed=3,1"], CONF):
        cfg = compose("train", cell.overrides, return_hydra_config=True)
        with open_dict(cfg):
            hydra_cfg = cfg.pop("hydra")
        expected = describe(cfg, hydra_cfg)
        assert cell.run.config == expected.config
        assert (cell.run.id, cell.run.name) == (expected.id, expected.name)
        assert cell.run.choices == expected.choices
        assert cell.run.command == f"python train.py {' '.join([*overrides, f'seed={cell.seed}'])}"
    (added,) = cells_of(["protocol=quick", "+model.bias=true", "schedule.p=0.25", "seed=0"], CONF)
    assert added.run.config["model"]["bias"] is True and added.run.config["schedule"]["p"] == 0.25


def test_a_sweep_by_hand_makes_the_runs_of_a_table(tmp_path, run_train):
    short = ["protocol=quick", "epochs=1", "model.width=4"]
    grid = ["schedule=constant,linear", "schedule.p=0.25,0.5", "seed=0,1"]
    run_train("-m", *short, *grid, f"outputs={tmp_path}")
    made = {path.parent.name for path in tmp_path.glob("*/result.json")}
    expected = set()
    for overrides in expand(grid[:2], "grid"):
        expected |= {cell.run.name for cell in cells_of([*short, "method=rst", *overrides, "seed=0,1"], CONF)}
    assert made == expected and len(made) == 8


def test_expansion():
    assert expand(["a=1,2", "b=x", "c=range(0,3)"], "t") == [
        [f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in (0, 1, 2)
    ]
    assert expand([], "t") == [[]]
    assert expand(["a=[1,2]"], "t") == [["a=[1,2]"]]


def test_rows_and_columns_sweep_and_are_labelled(spec_of):
    row = {
        "label": "{schedule} at {schedule.p}",
        "overrides": ["schedule=linear,constant", "schedule.p=0.1,0.2"],
    }
    spec = spec_of({"one": [["augment=none,cutout"], ["model=resnet20"]]}, rows=[SGD, SAM, row], seeds="7,8")
    assert [r.label for r in spec.rows][2:] == [
        "linear at 0.1", "linear at 0.2", "constant at 0.1", "constant at 0.2",
    ]  # fmt: skip
    assert spec.columns == [["augment=none"], ["augment=cutout"], ["model=resnet20"]]
    found = list(cells(spec, CONF, "quick", ["epochs=1", "augment.cutout=0"]))
    assert len(found) == 3 * 6
    assert {cell.seed for _, _, row_cells in found for cell in row_cells} == {7, 8}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": [SGD, SAM], "colums": "all"}, "table t: unknown colums; known are baseline, columns"),
        ({"rows": [SGD, {**SAM, "overides": []}]}, "table t, row SAM: unknown overides; known are"),
        ({"rows": [SGD, {"label": "SAM"}]}, "table t, row SAM: overrides must be given"),
        ({"rows": [SGD, SAM, SAM]}, "table t: two rows with one label: SAM"),
        ({"rows": [SGD]}, "table t: no row is labelled SAM; rows: SGD"),
        (
            {"rows": [SGD, {"label": "SAM", "overrides": ["schedule.p=${grid.q}"]}]},
            "table t: Interpolation key 'grid.q' not found",
        ),
        ({"rows": [SGD, SAM], "columns": "two"}, "table t: columns must be one of one, got 'two'"),
        (
            {"rows": [SGD, {"label": "SAM", "overrides": ["seed=range(0"]}]},
            r"table t: Hydra rejects 'seed=range\(0'",
        ),
        (
            {"rows": [SGD, SAM], "metrics": ["eta", "testerror"]},
            "table t: unknown metrics testerror; known are",
        ),
        ({"rows": [SGD, {**SAM, "overrides": "method=sam"}]}, "table t, row SAM: overrides must be a list"),
        ({"rows": [SGD, {**SAM, "published": 4.2}]}, "table t, row SAM: the published value needs a source"),
        (
            {"rows": [SGD, {"label": "SAM {schedule.p}", "overrides": ["method=sam"]}]},
            r"table t: label 'SAM \{schedule.p\}' names 'schedule.p', which no override sets",
        ),
    ],
)
def test_a_specification_that_cannot_be(spec_of, keys, message):
    with pytest.raises(ValueError, match=message):
        spec_of(**keys)


def test_a_missing_key(spec_of, tmp_path):
    with pytest.raises(ValueError, match="table t: rows must be given"):
        spec_of()


def test_only_the_seed_may_sweep_beside_the_table():
    with pytest.raises(ValueError, match=r"only seed= may sweep here, not schedule.p=0.1,0.2"):
        cells_of(["protocol=quick", "schedule.p=0.1,0.2"], CONF)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        cells_of(["protocol=quick", "seed=0,-1"], CONF)


def test_every_preset_of_columns_composes():
    for protocol in PROTOCOLS:
        columns = OmegaConf.to_container(OmegaConf.load(CONF / "columns" / f"{protocol}.yaml"))
        assert set(columns) == {"one", "all", "imagenet", "label_noise", "pilot", "grid"}
        for column in itertools.chain.from_iterable(expand(sweep, protocol) for sweep in columns["one"]):
            assert compose("train", [f"protocol={protocol}", *column])
