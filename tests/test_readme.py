"""The README's commands run, in a shortened form, and its figures are those of the committed results."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, train_command
from conftest import command as command_line
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))
import readme

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
TRAIN = [command for command in COMMANDS if command.startswith("python train.py ")]


def test_every_command_is_known():
    # On several devices what is among the commands for one.
    parallel = [text for text in COMMANDS if text.startswith("torchrun ")]
    assert [re.sub(r"torchrun \S+", "python", text) in TRAIN for text in parallel] == [True]
    others = [shlex.split(text) for text in COMMANDS if text not in TRAIN + parallel]
    assert {"reproduce-tables", "plan", "test"} <= {words[1] for words in others}
    for words in others:
        if words[:2] == ["python", "scripts/sharpness.py"]:
            continue  # tests/test_sharpness.py runs it
        assert words[0] == "make"
        assert command_line(*words, "--dry-run").returncode == 0, words
    assert len(TRAIN) >= 6


@pytest.fixture
def flowers(tmp_path):
    """A small image folder of two classes, 40×36 pixels."""
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 12), ("test", 4)):
        for name in ("rose", "tulip"):
            (tmp_path / "flowers" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (36, 40, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / "flowers" / split / name / f"{i}.png")
    return tmp_path / "flowers"


@pytest.mark.parametrize("command", TRAIN)
def test_command(command, run_train, tmp_path, cifar10_root, cifar100_root, flowers, monkeypatch):
    # Smaller in every way that leaves the options under test as they are.
    arguments = shlex.split(command)[2:]
    shorter = ["epochs=1", f"outputs={tmp_path / 'outputs'}"]
    if "--multirun" in arguments or "-m" in arguments:
        shorter += [] if any(a.startswith("seed=") for a in arguments) else ["seed=0"]
    if "dataset=imagenet" in arguments:
        for split in ("train", "val"):
            (tmp_path / "imagenet").mkdir(exist_ok=True)
            (tmp_path / "imagenet" / split).symlink_to(flowers / "train")
        arguments[arguments.index("dataset.root=/data/imagenet")] = f"dataset.root={tmp_path / 'imagenet'}"
        shorter += ["batch_size=12", "dataset.image_size=64", "dataset.workers=0", "dataset.name=mini"]
    elif "dataset=image_folder" in arguments:
        arguments[arguments.index("dataset.root=data/flowers")] = f"dataset.root={flowers}"
        shorter += ["batch_size=12"]
    elif "protocol=quick" not in arguments:
        shorter += [f"dataset.root={cifar10_root}", "batch_size=50"]
    if "protocol=cpu" in arguments:
        shorter += ["dataset.train_size=50"]
    if "model=wrn28_10" in arguments:
        shorter += ["model.width=16"]
    elif "model=pyramidnet272_shakedrop" in arguments:
        shorter += ["model.alpha=3", "dataset.train_size=100"]
    elif "model=vit_small" in arguments:
        shorter += ["+model.depth=1", "warmup_epochs=0"]
    elif not any(a.startswith(("model=", "protocol=")) for a in arguments):
        shorter += ["model=resnet8", "model.width=4"]
    if "tracker=wandb" in arguments:
        monkeypatch.setenv("WANDB_MODE", "offline")
    if "hydra/launcher=joblib" in arguments:  # which sends the task to other processes
        done = train_command(*arguments, *shorter)
        assert done.returncode == 0, done.stderr
    else:
        run_train(*arguments, *shorter)
    n_runs = 1
    for argument in [*arguments, *shorter]:
        n_runs *= len(argument.split(",")) if "-m" in arguments else 1
    assert len(list((tmp_path / "outputs").glob("*/result.json"))) == n_runs


def test_the_loop(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(50)]
    names = {"model": model, "loader": loader, "epochs": 2}
    exec(block, names)
    assert names["optimizer"].steps == 100
    assert names["optimizer"].gamma == pytest.approx(1 / 0.495)  # the mean of t/100 over t = 0 … 99
    assert 1 < float(capsys.readouterr().out) < 2


def test_the_table_is_the_committed_one(tmp_path):
    # Not that of the working tree: whoever reproduces the table has other times there.
    results = ROOT / "results"
    if shutil.which("git") and (ROOT / ".git").exists():
        archive = subprocess.run(
            ["git", "archive", "HEAD", "results"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", tmp_path], input=archive.stdout, check=True)
        results = tmp_path / "results"
    for match in readme.MARKED.finditer(TEXT):
        assert match[0] == match[1] + readme.section(results, match[2]) + match[3]


@pytest.mark.slow
def test_list_and_the_table_of_models():
    done = train_command("--list")
    assert done.returncode == 0, done.stderr
    for option in ("cifar100", "autoaugment", "grst", "trigonometric", "paper"):
        assert option in done.stdout
    for path in (ROOT / "conf").glob("*/*.yaml"):
        if path.parent.name not in ("claims", "table", "columns", "recipe"):
            line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [path.stem])
            assert len(line.split()) > 2, f"{path} begins with no comment"
    # README's table has the same names, sizes and comments.
    (match,) = readme.MODELS.finditer(TEXT)
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in match[0].splitlines()[3:-1]]
    assert {name for name, _, _ in rows} == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    listed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    for row in rows:
        assert " ".join(filter(None, row)) in listed
    assert ["wrn28_10", "36 220 634"] in [row[:2] for row in rows]
