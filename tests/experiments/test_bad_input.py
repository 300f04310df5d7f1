"""What users get wrong, and the one line that says so. Nothing is left behind."""

import shutil
import tarfile
from unittest import mock

import numpy as np
import pytest
from conftest import train_command
from hydra.errors import HydraException
from PIL import Image

from rst.experiments import command_line
from rst.training import checkpoint

TINY = ["dataset=digits", "model=resnet8", "augment=none", "epochs=1", "threads=1"]


@pytest.fixture
def refusal(run_train, tmp_path):
    """`refusal("epochs=0", ...)` is the line that train.py ends with; it must have written nothing."""

    def run(*arguments, outputs=tmp_path / "outputs"):
        with pytest.raises(SystemExit) as stopped:
            run_train(*arguments, f"outputs={outputs}")
        message = stopped.value.code  # a string: Python prints it on stderr and exits with 1
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "outputs").exists()
        return message

    return run


SETTINGS = {
    # Misspelt.
    "epoch=3": "epoch: unknown, --help lists what can be set",
    "+epoch=3": "epoch: unknown, choose from epochs",
    "+checkpoint.every=3": "checkpoint.every: unknown, choose from every_steps",
    "+optimizer.momntum=1": "optimizer.momntum: unknown, choose from momentum",
    "+model.widht=8": "resnet8() got an unexpected keyword argument 'widht'",
    "model=timm": "model.name",
    "model=timm model.name=resnt18": "unknown model 'resnt18'; closest are resnet18",
    # Options that do not exist: the choices are listed.
    "schedule=slow": "unknown option schedule/slow: choose from constant, linear, linear1",
    "precision=fp8": "precision=fp8: Input should be 'fp32', 'tf32', 'bf16' or 'fp16'",
    "method=grst method.mix=norm": "method.mix=norm: Input should be 'gradient' or 'normalized'",
    "device=tpu": "auto|cpu|mps|cuda",
    "device=cuda:99": "device=cuda:99 cannot be used",
    # Given by the run.
    "+method.seed=1": "method.seed follows from the other settings",
    "+model.num_classes=7": "model.num_classes follows from the other settings",
    # Values of another type: a word would otherwise be taken for true.
    "epochs=1e3": "epochs=1000.0: Input should be a valid integer",
    "dataset.validation=no": "dataset.validation=no: Input should be a valid boolean",
    "optimizer.lr=nan": "optimizer.lr=nan: Input should be a finite number",
    "optimizer=adamw l2=0 +optimizer.betas=0.9": "optimizer.betas=0.9: Input should be a valid array",
    "~optimizer": "optimizer: Field required",
    "~schedule.p": "schedule.p: Field required",
    # Values out of range.
    "epochs=0": "epochs=0: Input should be greater than 0",
    "threads=100000000": "threads=100000000: Input should be less than or equal to 1024",
    "checkpoint.every_steps=0": "checkpoint.every_steps=0: Input should be greater than 0",
    "clip_norm=0": "clip_norm=0: Input should be greater than 0",
    "schedule.p=1.5": "schedule: the schedule's p must be a number in [0, 1], got 1.5",
    "method.rho=-1": "method: rho must be a finite number of at least 0, got -1",
    "optimizer=adamw l2=0 +optimizer.betas=[0.9,2]": "optimizer: Invalid beta parameter at index 1: 2",
    "lr_schedule=step lr_schedule.milestones=[15]": "milestones are fractions of the run",
    "augment.cutout=-1": "augment: cutout is in pixels and must be at least 0",
    "model.width=0": "width must be a whole number of at least 1 channel, got 0",
    # Contradictions between settings, or with the data.
    "warmup_epochs=30": "warmup_epochs=30 must be less than epochs=30",
    "method=sam schedule=linear": "method=sam always takes a SAM step, which contradicts schedule=linear",
    "method=sgd schedule.p=0.5": "method=sgd never takes a SAM step, which contradicts schedule.p=0.5",
    "method=aesam schedule=linear": "method=aesam does not go by a schedule: leave schedule=linear out",
    "method=partial schedule.p=0.5": "always takes a SAM step, which contradicts schedule.p=0.5",
    "method=looksam method.alpha=-1": "method: alpha must be a finite number of at least 0, got -1",
    "method=msam optimizer=adamw l2=0": "AdamW has none: use SGD(momentum=0.9), say",
    "method=grst schedule.p=0": "method: gamma='matched' is 1 / mean p, and this schedule has mean p = 0",
    "optimizer=adamw": "both l2 and optimizer.weight_decay are set: add l2=0",
    "optimizer.momentum=0": "optimizer: Nesterov momentum requires a momentum",
    "precision=fp16 method=grst method.mix=normalized": "does not commute with fp16's loss scaling",
    "protocol=paper dataset=digits model=resnet8": "protocol=paper has no recipe for model=resnet8",
    "batch_size=5000": "batch_size must be between 1 and the 1297 training images, got 5000",
    "grad_accumulation=3": "grad_accumulation must divide the 64 images",
    "model=vgg16_bn": "model cifar_vgg16_bn cannot be used on images of 1×8×8",
    "augment=cutout": "cutout must be at most the image side 8, got 16",
    "augment=inception": "these images are held in memory",
}


@pytest.mark.parametrize("arguments", SETTINGS)
def test_settings(arguments, refusal):
    protocol = [] if "protocol=" in arguments else ["protocol=quick"]
    assert SETTINGS[arguments] in refusal(*protocol, *arguments.split())


def test_rho_that_does_not_reach_the_method_warns(refusal):
    with pytest.warns(UserWarning, match="method=asam takes method.rho=0.5, not rho"):
        refusal("protocol=quick", "method=asam", "rho=0.2", "batch_size=5000")


def test_several_mistakes_are_named_at_once(refusal):
    message = refusal("protocol=quick", "epochs=0", "precision=16")
    assert "epochs=0: " in message and "precision=16: " in message


GLOBAL = "# @package _global_\n"
PRESETS = {  # a file of the user's own: its group, its content
    "misspelt": ("protocol", GLOBAL + "epoch: 3", "epoch: unknown, choose from epochs"),
    "misspelt in a group": ("protocol", GLOBAL + "schedule: {risng: false}", "schedule.risng: unknown"),
    "not global": ("protocol", "epochs: 3", "its file must begin with '# @package _global_'"),
    "broken YAML": ("protocol", GLOBAL + "epochs: [3\nseed: {", 'in "{file}", line 2, column 9'),
    "no target": ("model", "name: resnet8", "model: a _target_ is needed"),
    "other outputs": (
        "model",
        "_target_: torch.nn.Identity",
        "returns (1, 1, 8, 8) for one image, not (1, 10)",
    ),
    "unknown module": ("model", "_target_: nothere.create", "nothere.create"),
    "missing argument": ("schedule", "_target_: rst.Linear\nstart: 0", "schedule.end: Field required"),
}


@pytest.mark.parametrize("case", PRESETS)
def test_presets(case, refusal, tmp_path):
    group, content, expected = PRESETS[case]
    file = tmp_path / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    others = TINY if group == "protocol" else ["protocol=quick"]
    message = refusal(f"--config-dir={tmp_path / 'conf'}", *others, f"{group}=mine")
    assert expected.format(file=file) in message


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, four images of 8×8 each, under train, test and val."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    for split in ("train", "test", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def remove(*paths):
    return lambda root: [shutil.rmtree(root / path) for path in paths]


def spoil(path):
    return lambda root: (root / path).write_bytes(b"not an image")


def pack_incompletely(root):
    path = root / "train.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(root / "train", "")
    shutil.rmtree(root / "train")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 4])


FOLDER, STREAMED = "dataset=image_folder", "dataset=image_folder dataset.in_memory=false dataset.workers=1"
IMAGENET = "dataset=imagenet dataset.name=mine dataset.image_size=8 dataset.workers=0 augment=none"
DATA = {  # what is done to the folder of images, arguments; tests/data has more
    "no folder": (remove(""), FOLDER, "no folder {root}: expected {root}/train/<class>/* and {root}/test"),
    "one class": (remove("train/dog", "test/dog"), FOLDER, "all images are of one class, cat"),
    "no image, streamed": (spoil("test/dog/0.png"), STREAMED, "cannot decode {root}/test/dog/0.png"),
    "incomplete tar": (pack_incompletely, IMAGENET, "{root}/train.tar is incomplete or no tar file"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, refusal, images):
    change, arguments, expected = DATA[case]
    change(images)
    message = refusal(*TINY, "batch_size=2", *arguments.split(), f"dataset.root={images}")
    assert expected.format(root=images) in message


def test_a_damaged_image_that_only_training_opens(run_train, images, tmp_path):
    """ImageNet's images are not decoded beforehand: the run has begun, and has no result."""
    spoil("train/cat/3.png")(images)
    arguments = [*TINY, "batch_size=8", *IMAGENET.split(), f"dataset.root={images}"]
    with pytest.raises(SystemExit, match=rf"^error: cannot decode {images}/train/cat/3\.png: [^\n]+$"):
        run_train(*arguments, f"outputs={tmp_path / 'outputs'}")
    (folder,) = (tmp_path / "outputs").iterdir()
    assert not (folder / "result.json").exists()


def test_a_folder_that_cannot_be_written(refusal, tmp_path):
    (tmp_path / "file").write_text("")  # permissions would not stop a test that runs as root
    message = refusal("protocol=quick", outputs=tmp_path / "file" / "outputs")
    assert f"cannot write to outputs={tmp_path}/file/outputs (" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_process_prints_that_line_alone():
    done = train_command("protocol=quick", "schedule.p=1.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: schedule: the schedule's p must be a number in [0, 1], got 1.5\n"


def test_hydra_full_error_shows_the_traceback(run_train, monkeypatch):
    launch = command_line.launch

    def with_full_error(main):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        launch(main)

    monkeypatch.setattr(command_line, "launch", with_full_error)
    with pytest.raises(ValueError, match=r"got 1\.5"):  # in the job
        run_train("protocol=quick", "schedule.p=1.5")
    with pytest.raises(HydraException, match="epoch"):  # before it
        run_train("protocol=quick", "epoch=3")


def test_one_bad_job_lets_the_others_of_its_sweep_finish(run_train, tmp_path, capsys):
    short = ["protocol=quick", "epochs=1", "model.width=4", f"outputs={tmp_path}"]
    with pytest.raises(SystemExit, match=r"^error: schedule: the schedule's p must be"):
        run_train("-m", *short, "schedule.p=1.5,0.5", "seed=0")
    printed, errors = capsys.readouterr()
    assert "Traceback" not in printed + errors
    assert "error in" in printed and "schedule.p=1.5" in printed
    assert len(list(tmp_path.glob("*/result.json"))) == 1


def damage(folder):
    for path in folder.glob("checkpoint*.pt"):
        path.write_bytes(b"")


def take_from_another_run(folder):
    checkpoint.save(folder / "checkpoint.pt", {}, "0123abcd")


def take_from_another_version(folder):
    with mock.patch.object(checkpoint, "SCHEMA", 99):
        checkpoint.save(folder / "checkpoint.pt", {}, folder.name.rpartition("-")[2])


@pytest.mark.parametrize("change", [damage, take_from_another_run, take_from_another_version])
def test_a_checkpoint_that_cannot_be_used_is_left_as_it_is(change, run_train, tmp_path):
    arguments = ["protocol=quick", "epochs=1", "model.width=4", f"outputs={tmp_path}"]
    run_train(*arguments)
    (folder,) = tmp_path.iterdir()
    (folder / "result.json").unlink()
    change(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match=rf"^error: {folder}/checkpoint.pt .*remove "):
        run_train(*arguments)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
