"""README and docs: links lead somewhere; code and commands run, shortened, in a copy of the repository."""

import re
import shlex
import subprocess
import sys
from functools import partial, wraps

import conftest
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: F401  for the pages
from conftest import ROOT
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser
from torch.optim import SGD

from rst import RST, Linear, data, models  # noqa: F401
from rst.experiments import driver, sweeps
from rst.reporting.claims import read_claims, tables_of_claims
from rst.reporting.records import records_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"```\w+\n(# (\S+\.(?:py|yaml))\n.*?)```", re.DOTALL)  # begins with its name
OF_FRAMEWORKS = re.compile(r"^from (lightning|transformers|accelerate)\b", re.MULTILINE)
CODE = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
SHORTER = ["epochs=1", "warmup_epochs=0", "batch_size=4", "compile=false", "device=cpu", "seed=0"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@every_page
def test_pages_are_short_and_their_links_lead_somewhere(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@every_page
def test_code_and_commands_run(page, project, run_script, monkeypatch):
    monkeypatch.setattr(sweeps, "read_table", partial(with_few_rows, sweeps.read_table))
    for language, block in CODE.findall(FILE.sub("", page.read_text())):
        if language == "python":
            if not OF_FRAMEWORKS.search(block):
                run_python(block)
            continue
        for line in block.splitlines():
            run_command(shlex.split(line, comments=True), project, run_script)


def test_the_example_of_a_claim_is_about_rows_of_the_example_table(project):
    families = read_claims(project / "conf" / "claims" / "quick.yaml")
    ours = {title: claims for title, claims in families.items() if claims[0].table.startswith("late/")}
    with initialize_config_dir(str(project / "conf"), version_base="1.3"):
        (table,), _ = sweeps.gather(["late"], project / "conf", "quick", ["seed=0"])
    assert "not run" in tables_of_claims(ours, {"late": table}, records_of([]))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the repository with the pages' example files, and with small data and models."""
    copied = ("conf", "scripts", "train.py", "Makefile", "pyproject.toml", "constraints.txt")
    subprocess.check_call(["cp", "-r", *(ROOT / name for name in copied), tmp_path])
    for block, name in FILE.findall("".join(page.read_text() for page in PAGES)):
        with (tmp_path / name).open("a") as file:
            file.write(block)
    for i in range(24):
        folder = tmp_path / "images" / ("train" if i < 16 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 99).convert("RGB").save(folder / f"{i}.png")
    create, images = models.create, partial(data.image_folder, str(tmp_path / "images"), workers=0)

    def small_model(name, num_classes, in_chans, image_size, **options):
        with torch.device("meta"):  # the real one, for its errors
            create(name, num_classes, in_chans, image_size, **options)
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size[0] * image_size[1], num_classes))

    # `wraps` gives them the signatures that options are checked against.
    monkeypatch.setattr(models, "create", wraps(create)(small_model))
    for name in ("cifar10", "cifar100", "digits", "image_folder", "imagenet"):
        small = partial(lambda streamed, **_: images(in_memory=not streamed), name == "imagenet")
        monkeypatch.setattr(data, name, wraps(getattr(data, name))(small))
    monkeypatch.setattr(driver, "run_all", lambda *_: None)
    monkeypatch.setattr(driver, "write_claims", lambda *_: {"another"})
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "train", None)  # so that afterwards it is again what it was,
    monkeypatch.delitem(sys.modules, "train")  # and meanwhile the copy's
    return tmp_path


def with_few_rows(read_table, *arguments):
    """The first column, and the rows that others are compared with."""
    spec, columns = read_table(*arguments)
    spec.rows = [row for row in spec.rows if row.label in (spec.reference, spec.baseline)]
    return spec, dict([*columns.items()][:1])


def run_command(words, project, run_script):
    match words:
        case ["python", "train.py", *overrides]:
            # Other launchers would start processes that know nothing of the small data.
            if of_hydra := [word for word in overrides if word.startswith("hydra")]:
                with initialize_config_dir(str(project / "conf"), version_base="1.3"):
                    compose("train", of_hydra, return_hydra_config=True)
            kept = [word for word in overrides if word not in of_hydra and not word.startswith("seed=")]
            for run in each_value_once(kept) if "-m" in kept else [kept]:
                run_script("train.py", *run, *SHORTER)
            assert list(project.glob("outputs/*/result.json"))
        case ["torchrun", *arguments]:
            parsed = get_args_parser().parse_args(arguments)
            run_command(["python", parsed.training_script, *parsed.training_script_args], project, run_script)
        case ["python", "scripts/sharpness.py", *patterns]:
            runs = [run for pattern in patterns for run in project.glob(pattern)]
            run_script("scripts/sharpness.py", *runs, "--jobs", 1)
        case ["make", *targets]:
            variables = [word.partition("=")[0] for word in targets if "=" in word]
            assert all(f"$({name})" in (project / "Makefile").read_text() for name in variables)
            done = subprocess.check_output(["make", "--dry-run", *targets], cwd=project, text=True)
            for script, arguments in re.findall(r"python (scripts/(?:plan|reproduce).py)(.*)", done):
                table = re.search(r"--table (\w+)", arguments)[1].replace("all", "overview")
                rate = ["--images-per-second", 1000] if "plan" in script else []
                run_script(script, *shlex.split(arguments), "--table", table, *rate)
        case _:
            assert words in ([], ["source", ".venv/bin/activate"])


def each_value_once(sweep):
    """As few of a sweep's runs as have each of its values."""
    keys = [word.partition("=") for word in sweep if word != "-m"]
    lists = [[f"{key}={value}" for value in values.split(",")] for key, _, values in keys]
    return [[values[i % len(values)] for values in lists] for i in range(max(map(len, lists)))]


def run_python(block, **names_beside):
    """With what a reader has beside it: a model, data, and an optimizer where the block makes none."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    names = globals() | {"model": model, "x": x, "y": y, "device": "cpu", "epochs": 1, "total_steps": 8}
    names |= {"loader": [(x, y)] * 4, "micro_batches": [(x, y)] * 2, "batches": [[(x, y)] * 2] * 4}
    names |= {"scaler": torch.amp.GradScaler("cpu"), "optimizer": RST(SGD(model.parameters()), 1.0, 8)}
    split = [[p for p in model.parameters() if (p.ndim == 2) is matrices] for matrices in (True, False)]
    names |= {"muon": SGD(split[0]), "adamw": SGD(split[1])}
    names |= names_beside
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(block, names := names | {"mesh": dist.init_device_mesh("cpu", (1,))})
    finally:
        dist.destroy_process_group()
    assert names["optimizer"].steps > 0 or ".step()" not in block
