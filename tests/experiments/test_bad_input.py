"""What a user gets wrong, and the one line that says so: settings, presets, data, machine, run folders.

In each table the left is the mistake, the right what the line must hold. Nothing may be left behind.
"""

import io
import re
import shutil
import tarfile
from unittest import mock

import numpy as np
import pytest
from conftest import train_command
from PIL import Image

from rst.training import checkpoint

TINY = ["dataset=digits", "model=resnet8", "augment=none", "epochs=1", "threads=1"]


@pytest.fixture
def refusal(run_train, tmp_path):
    """`refusal("epochs=0", ...)` is the one line that train.py ends with, having left no outputs."""

    def run(*arguments, outputs=tmp_path / "outputs"):
        with pytest.raises(SystemExit) as stopped:
            run_train(*arguments, f"outputs={outputs}")
        message = stopped.value.code  # a text: Python prints it on stderr and exits with 1
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "outputs").exists()
        return message

    return run


SETTINGS = {
    # Misspelt, or no setting at all.
    "epoch=3": "unknown setting 'epoch'; closest is epochs",
    "+epoch=3": "unknown setting 'epoch'; closest is epochs",
    "foo=3": "unknown setting 'foo'; python train.py --help shows them all",
    "--epochs=3": "unknown option --epochs=3: settings are given as epochs=VALUE, without dashes",
    "seed=0 -m seed=0,1": "options such as -m go before all settings or after them, not before seed=0,1",
    "epochs": "cannot read the argument 'epochs', which should be KEY=VALUE",
    "schedule.p=[": "cannot read the argument 'schedule.p=[', which should be KEY=VALUE",
    "seed=0,1": "To sweep over it, add --multirun to your command line",
    "~optimizer": "optimizer must be given",
    "checkpoint.every=3": "To append to your config use +checkpoint.every=3",
    "+checkpoint.every=3": "checkpoint.every is no option of a run: choose from every_steps, every_epochs",
    "+optimizer.beta=1": "optimizer.beta is no option of torch.optim.SGD: choose from lr, momentum",
    "+lr_schedule.factor=0.1": "lr_schedule.factor is no option of rst.training.lr_schedule.cosine",
    "+model.widht=8": "resnet8() got an unexpected keyword argument 'widht'",
    "+model.num_classes=7": "model.num_classes follows from the other settings: leave it out",
    "+method.seed=1": "method.seed follows from the other settings: leave it out",
    "+table=overview": "table=overview is no preset of a run",
    "model=timm": "model.name must be given: add model.name=VALUE",
    # Choices that there are not.
    "schedule=slow": "unknown schedule 'slow': choose from constant, linear, linear1, linear2, periodic",
    "model=vgg99": "unknown model 'vgg99': choose from pyramidnet164_270, pyramidnet164_270_shakedrop",
    "model=timm model.name=resnt18": "unknown model 'resnt18'; closest are resnet18",
    "dataset=mnist": "unknown dataset 'mnist': choose from cifar10, cifar100, cifar10_jpeg, digits",
    "tracker=mlflow": "unknown tracker 'mlflow': choose from none, tensorboard, wandb",
    "hydra/launcher=nothere": "unknown hydra/launcher 'nothere': choose from basic, joblib",
    "method=null": "a group must be one of its options, as in method=sam: python train.py --list shows them",
    "device=tpu": "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'",
    "device=meta": "device must be auto, cpu, cuda, cuda:N or mps, got 'meta'",
    "device=0": "device must be auto, cpu, cuda, cuda:N or mps, got 0",
    "device=cuda:99": "device=cuda:99 cannot be used",
    "precision=fp8": "precision must be fp32 or tf32 or bf16 or fp16, got 'fp8'",
    "precision=16": "precision must be fp32 or tf32 or bf16 or fp16, got 16",
    "method=grst method.mix=norm": "method.mix must be gradient or normalized, got 'norm'",
    # Values of another kind. A word that is not true or false would otherwise be taken for true.
    "seed=1.5": "seed must be a whole number of at least 0, got 1.5",
    "epochs=1e3": "epochs must be a whole number of at least 1, got 1000.0",
    "epochs=true": "epochs must be a whole number of at least 1, got True",
    "batch_size=big": "batch_size must be a whole number of at least 1, got 'big'",
    "dataset.train_size=many": "dataset.train_size must be a whole number or null, got 'many'",
    "dataset.validation=no": "dataset.validation must be true or false, got 'no'",
    "channels_last=off": "channels_last must be true or false, got 'off'",
    "optimizer.lr=fast": "optimizer.lr must be a finite number, got 'fast'",
    "optimizer=adamw l2=0 +optimizer.betas=0.9": "optimizer.betas must be a list, each a finite number, got",
    "model.width=1.5": "width must be a whole number of at least 1 channel, got 1.5",
    "method=grst method.gamma=match": "method.gamma must be a finite number or matched, got 'match'",
    # Values that are no numbers, and would spread through the weights.
    "schedule.p=nan": "schedule.p must be a finite number, got nan",
    "method.rho=nan": "method.rho must be a finite number, got nan",
    "optimizer.lr=nan": "optimizer.lr must be a finite number, got nan",
    "clip_norm=nan": "clip_norm must be a finite number or null, got nan",
    "clip_norm=inf": "clip_norm must be a finite number or null, got inf",
    "l2=nan": "l2 must be a finite number, got nan",
    "dataset.label_noise=nan": "dataset.label_noise must be a finite number, got nan",
    # Values out of range.
    "seed=-1": "seed must be a whole number of at least 0, got -1",
    "epochs=0": "epochs must be a whole number of at least 1, got 0",
    "warmup_epochs=30": "warmup_epochs=30 must be less than epochs=30",
    "warmup_epochs=-1": "warmup_epochs must be a whole number of at least 0, got -1",
    "threads=0": "threads must be a whole number of at least 1, got 0",
    "threads=100000000": "threads must be at most 1024, got 100000000",
    "batch_size=5000": "batch_size must be between 1 and the 1297 training images, got 5000",
    "evaluate_every=0": "evaluate_every must be a whole number of at least 1, got 0",
    "grad_accumulation=0": "grad_accumulation must be a whole number of at least 1, got 0",
    "grad_accumulation=3": "grad_accumulation must divide the 64 images of a batch that a rank has, got 3",
    "checkpoint.every_steps=0": "checkpoint.every_steps must be a whole number of at least 1, or null, got 0",
    "checkpoint.every_epochs=1.5": "checkpoint.every_epochs must be a whole number of at least 1, or null",
    "checkpoint.every_minutes=-1": "checkpoint.every_minutes must be above 0, or null, got -1",
    "optimizer.lr=-0.1": "optimizer.lr must be above 0, got -0.1",
    "optimizer.momentum=2": "optimizer.momentum must be at least 0 and less than 1, got 2",
    "optimizer=adamw l2=0 +optimizer.betas=[0.9,2]": "Invalid beta parameter at index 1: 2",
    "lr_schedule=step lr_schedule.factor=10": "lr_schedule.factor must be above 0 and at most 1, got 10",
    "lr_schedule=step lr_schedule.milestones=[15]": "lr_schedule.milestones are fractions of the run",
    "l2=-1": "l2 must be at least 0, got -1",
    "clip_norm=0": "clip_norm must be above 0",
    "schedule.p=1.5": "the schedule's p must be a number in [0, 1], got 1.5",
    "schedule=piecewise1 schedule.p=2": "boundary must be a number in [0, 1], got 2",
    "method.rho=-1": "rho must be a finite number of at least 0, got -1",
    "method=grst method.gamma=0": "gamma must be a finite number above 0, or 'matched', got 0",
    "model.width=0": "width must be a whole number of at least 1 channel, got 0",
    "dataset.label_noise=2": "label_noise must be between 0 and 1, got 2",
    "dataset.train_size=5000": "train_size must be 1297 (all training images) or from 10 to 1287 (of",
    # Settings that contradict each other, or the data.
    "method=sam schedule=linear": "method=sam takes a SAM step always, which contradicts schedule=linear",
    "method=sgd schedule.p=0.5": "method=sgd takes a SAM step never, which contradicts schedule.p=0.5",
    "method=grst schedule.p=0": "gamma='matched' is 1 / mean p, and this schedule has mean p = 0",
    "optimizer=adamw": "both l2 and optimizer.weight_decay are set: add l2=0",
    "optimizer.momentum=0": "optimizer.momentum=0 needs optimizer.nesterov=false",
    "precision=fp16 method=grst method.mix=normalized": "does not commute with fp16's loss scaling",
    "model=vgg16_bn": "model cifar_vgg16_bn cannot be used on images of 1×8×8",
    "model=timm model.name=vit_tiny_patch16_224": "must be multiples of its patches' 16×16 pixels",
    "augment=cutout": "cutout must be at most the image side 8, got 16",
    "augment=autoaugment augment.crop_padding=1": "autoaugment needs RGB images",
    "augment=mixup augment.crop_padding=1 batch_size=1": "mixup mixes the images of a batch",
    "augment=inception": "these images are held in memory",
    "protocol=paper dataset=digits model=resnet8": "protocol=paper has no recipe for model=resnet8",
}


@pytest.mark.parametrize("arguments", SETTINGS)
def test_settings(arguments, refusal):
    protocol = [] if "protocol=" in arguments else ["protocol=quick"]
    assert SETTINGS[arguments] in refusal(*protocol, *arguments.split())


GLOBAL = "# @package _global_\n"
PRESETS = {  # a file of the user's own: its group, its content
    "misspelt": ("protocol", GLOBAL + "epoch: 3", "unknown setting 'epoch'; closest is epochs"),
    "misspelt in a group": (
        "protocol",
        GLOBAL + "schedule: {risng: false}",
        "schedule.risng is no option of rst.schedule.Linear.with_mean: choose from p, rising",
    ),
    "not global": ("protocol", "epochs: 3", "the file of one begins with the line '# @package _global_'"),
    "empty": ("protocol", "", "the file of one begins with the line '# @package _global_'"),
    "broken YAML": (
        "protocol",
        GLOBAL + "epochs: [3\nseed: {",
        'not valid YAML: while parsing a flow sequence in "{file}", line 2, column 9',
    ),
    "a key twice": (
        "protocol",
        GLOBAL + "epochs: 3\nepochs: 4",
        "not valid YAML: while constructing a mapping",
    ),
    "no colon": ("protocol", GLOBAL + "epochs 3", "unknown setting 'epochs 3'; closest is epochs"),
    "unknown interpolation": (
        "protocol",
        GLOBAL + "warmup_epochs: ${epoch}",
        "Interpolation key 'epoch' not found",
    ),
    "unknown choice": (
        "protocol",
        GLOBAL + "defaults: [override /lr_schedule: slow]",
        "unknown lr_schedule 'slow': choose from constant, cosine, step",
    ),
    "no target": ("model", "name: resnet8", "model needs a _target_, the function or class that makes it"),
    "unknown module": (
        "model",
        "_target_: nothere.create\n_partial_: true",
        "model: cannot import nothere.create (No module named 'nothere')",
    ),
    "unknown function": (
        "schedule",
        "_target_: rst.Linear.mean\np: 0.5",
        "schedule: cannot import rst.Linear.mean (type object 'Linear' has no attribute 'mean')",
    ),
    "unknown argument": (
        "dataset",
        "_target_: rst.data.digits\nnoise: 0.1",
        "dataset.noise is no option of rst.data.digits: choose from label_noise, train_size, validation",
    ),
    "missing argument": (
        "schedule",
        "_target_: rst.Linear\nstart: 0",
        "schedule.end must be given: rst.Linear",
    ),
    "not partial": ("optimizer", "_target_: torch.optim.SGD\nlr: 0.1", "optimizer must have _partial_: true"),
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


def save_image(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, four images of 8×8 each, under train, test and val."""
    root = tmp_path / "images"
    for split in ("train", "test", "val"):
        for name in ("cat", "dog"):
            for i in range(4):
                save_image(root / split / name / f"{i}.png")
    return root


def remove(*paths):
    return lambda root: [shutil.rmtree(root / path) for path in paths]


def move(old, new):
    return lambda root: (root / old).rename(root / new)


def write(path, content=b"not an image"):
    return lambda root: (root / path).write_bytes(content)


def pack(split, cut=0, only="*"):
    """The folder of a split as a tar file, without its last `cut` bytes."""

    def make(root):
        path = root / f"{split}.tar"
        with tarfile.open(path, "w") as tar:
            for file in sorted((root / split).rglob(only)):
                tar.add(file, file.relative_to(root / split), recursive=False)
        shutil.rmtree(root / split)
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])

    return make


def both(*changes):
    return lambda root: [change(root) for change in changes]


def shard(root):
    """WebDataset's layout, an image without its label."""
    remove("train", "val")(root)
    for split in ("train", "val"):
        with tarfile.open(root / f"x-{split}-0.tar", "w") as tar:
            for name in ("a.cls", "b.png"):
                entry = tarfile.TarInfo(name)
                entry.size = 1
                tar.addfile(entry, io.BytesIO(b"0"))


FOLDER, STREAMED = "dataset=image_folder", "dataset=image_folder dataset.in_memory=false dataset.workers=1"
IMAGENET = "dataset=imagenet dataset.name=mine dataset.image_size=8 dataset.workers=0 augment=none"
DATA = {  # how the folder of images is spoilt, arguments
    "no folder": (remove(""), FOLDER, "no folder {root}: expected {root}/train/<class>/* and {root}/test"),
    "no test": (remove("test"), FOLDER, "no folder {root}/test: expected"),
    "no class": (remove("train/cat", "train/dog"), FOLDER, "no images in {root}/train: expected"),
    "one class": (
        remove("train/dog", "test/dog"),
        FOLDER,
        "all images are of one class, cat: training needs two or more",
    ),
    "an empty class": (
        both(remove("train/dog"), lambda root: (root / "train" / "dog").mkdir()),
        FOLDER,
        "{root}: train and test must have the same classes: dog only in test/",
    ),
    "classes that differ": (
        move("test/dog", "test/wolf"),
        FOLDER,
        "{root}: train and test must have the same classes: dog only in train/, wolf only in test/",
    ),
    "no image": (write("train/cat/3.png"), FOLDER, "cannot decode {root}/train/cat/3.png: cannot identify"),
    "no image, streamed": (write("test/dog/0.png"), STREAMED, "cannot decode {root}/test/dog/0.png: cannot"),
    "an empty file": (write("train/cat/3.png", b""), FOLDER, "cannot decode {root}/train/cat/3.png: cannot"),
    "sizes that differ": (
        lambda root: save_image(root / "train" / "dog" / "4.png", side=9),
        FOLDER,
        "{root}/train/dog/4.png is 9×9 pixels but {root}/train/cat/0.png is 8×8: set dataset.image_size",
    ),
    "too small a batch": (both(), f"{FOLDER} batch_size=9", "between 1 and the 8 training images, got 9"),
    "too small for the model": (
        both(),
        f"{FOLDER} model=vgg16_bn",
        "model cifar_vgg16_bn cannot be used on images of 3×8×8",
    ),
    "too small a part": (
        both(),
        f"{FOLDER} dataset.train_size=7",
        "(all training images) or from 2 to 6 (of",
    ),
    "too few to hold out": (both(), f"{FOLDER} dataset.validation=true", "cannot divide 8 images by class"),
    "no pixel": (both(), f"{FOLDER} dataset.image_size=0", "image_size is in pixels and must be at least 1"),
    "a word for memory": (
        both(),
        f"{FOLDER} dataset.in_memory=on",
        "in_memory must be true or false or auto",
    ),
    "too many workers": (
        both(),
        f"{STREAMED} dataset.workers=1000",
        "workers must be from 0 to 256, or null",
    ),
    "no ImageNet": (
        both(),
        "dataset=imagenet augment=none",
        "{root} has 8 training images of 2 classes, which",
    ),
    "no val": (remove("val"), IMAGENET, "no val images in {root}: expected ROOT/train/<class>/*"),
    "no pixel of ImageNet": (
        both(),
        f"{IMAGENET} dataset.image_size=0",
        "image_size is in pixels and must be",
    ),
    "a cut tar": (pack("train", cut=2**13), IMAGENET, "{root}/train.tar is incomplete or no tar file"),
    "an empty tar": (
        both(remove("val"), write("val.tar", b"")),
        IMAGENET,
        "{root}/val.tar is incomplete or no",
    ),
    "a tar of nothing": (
        pack("val", only="*.jpg"),
        IMAGENET,
        "no images in {root}/val.tar: expected ROOT/train",
    ),
    "no label": (shard, IMAGENET, "{root}/x-train-0.tar: b.png has no label b.cls"),
    "no CIFAR": (
        both(),
        "dataset=cifar10 dataset.download=false",
        "no CIFAR10 in {root} (download=false): put",
    ),
    "damaged CIFAR": (
        both(move("train", "cifar-10-batches-py"), write("cifar-10-batches-py/data_batch_1")),
        "dataset=cifar10",
        "{root}/cifar-10-batches-py is incomplete or damaged (checksums differ): remove or replace it",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, refusal, images):
    spoil, arguments, expected = DATA[case]
    spoil(images)
    message = refusal(*TINY, "batch_size=2", *arguments.split(), f"dataset.root={images}")
    assert expected.format(root=images) in message


def test_a_file_that_only_training_opens(run_train, images, tmp_path):
    """ImageNet's images are not looked at before: the run has begun, and its folder says so."""
    (images / "train" / "cat" / "3.png").write_bytes(b"not an image")
    message = rf"^error: cannot decode {images}/train/cat/3\.png: cannot identify [^\n]+$"
    with pytest.raises(SystemExit, match=message):
        run_train(
            *TINY, "batch_size=8", *IMAGENET.split(), f"dataset.root={images}", f"outputs={tmp_path / 'o'}"
        )
    (folder,) = (tmp_path / "o").iterdir()
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("where", ["file", "file/outputs"])
def test_a_folder_that_cannot_be_written(where, refusal, tmp_path):
    outputs = tmp_path / where  # permissions would not stop a test that runs as root
    (tmp_path / "file").write_text("")
    message = refusal("protocol=quick", outputs=outputs)
    assert re.fullmatch(rf"error: cannot write to outputs={outputs} \(.+\); choose another folder", message)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_no_folder(refusal):
    assert refusal("protocol=quick", outputs="") == "error: outputs must name a folder, got ''"


def test_a_mode_of_wandb_that_there_is_not(refusal, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    message = refusal("protocol=quick", "tracker=wandb")
    assert message == "error: WANDB_MODE must be online, offline or disabled, got 'nonsense'"


def test_a_device_that_is_hidden(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = train_command("protocol=quick", "device=cuda", f"outputs={tmp_path / 'o'}", env=environment)
    assert (done.returncode, done.stdout) == (1, "") and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"error: device=cuda cannot be used \([^\n]+\); try device=auto\n", done.stderr)


def damaged(folder):
    for path in folder.glob("checkpoint*.pt"):
        path.write_bytes(b"")


def of_another_run(folder):
    checkpoint.save(folder / "checkpoint.pt", {}, "0123abcd")


def of_the_future(folder):
    with mock.patch.object(checkpoint, "SCHEMA", 99):
        checkpoint.save(folder / "checkpoint.pt", {}, folder.name[-8:])


CHECKPOINTS = {
    damaged: r"{file} is damaged \(its checksum differs.*\) and {previous} is damaged \(.*\): remove it, and",
    of_another_run: r"{file} is of a run with another configuration \(0123abcd, not {id}\): remove it, and",
    of_the_future: r"{file} is of schema 99, and this version reads 1: go on with the version that wrote it",
}


@pytest.mark.parametrize("spoil", CHECKPOINTS)
def test_checkpoints(spoil, run_train, tmp_path):
    arguments = ["protocol=quick", "epochs=2", "model.width=4", f"outputs={tmp_path}"]
    arguments.append("checkpoint.every_epochs=1")
    run_train(*arguments)
    (folder,) = tmp_path.iterdir()
    (folder / "result.json").unlink()
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        run_train(*arguments)
    names = {
        "file": folder / "checkpoint.pt",
        "previous": folder / "checkpoint-previous.pt",
        "id": folder.name[-8:],
    }
    assert re.match("error: " + CHECKPOINTS[spoil].format(**names), stopped.value.code)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
