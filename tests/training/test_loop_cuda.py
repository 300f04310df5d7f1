"""Training on a GPU: streamed images, and resuming bit for bit."""

import io
import itertools

import pytest
import torch
from PIL import Image

from rst import RST, Constant
from rst.data import Augment, image_folder
from rst.training.loop import Training
from rst.training.lr_schedule import cosine

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
SEED, BATCH = 3, 4


@pytest.fixture
def folder(tmp_path):
    """Twelve images for training and twelve for testing, in files."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (4, 4), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{i}.png")
    return str(tmp_path)


def start(images, precision="fp32"):
    """A network with BatchNorm and dropout, trained by G-RST."""
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3)).to(DEVICE)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = RST(base, Constant(0.5), 9, rho=0.3, gamma=2.0, module=model, seed=SEED)
    options = {"epochs": 3, "batch_size": BATCH, "seed": SEED, "clip_norm": 0.7, "precision": precision}
    return Training(
        model, optimizer, cosine, images.to(DEVICE), Augment(flip=True, crop_padding=1), **options
    )


def weights(training):
    return [p.detach().cpu() for p in training.model.parameters()]


def test_streamed_images_train_as_those_in_memory(folder):
    trained = []
    for options in ({"in_memory": True}, {"in_memory": False, "workers": 1}):
        run = start(image_folder(folder, **options))
        assert all(metrics is None or metrics["epoch"] for metrics in run.run())
        trained.append(weights(run))
    assert all(map(torch.equal, *trained))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resuming_continues_bit_for_bit(folder, precision):
    images = image_folder(folder)
    whole = start(images, precision)
    list(whole.run())
    run = start(images, precision)
    list(itertools.islice(run.run(), 5))
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    resumed = start(images, precision)
    torch.manual_seed(99)  # the state of the global generators does not matter
    resumed.load_state_dict(torch.load(file, weights_only=True))
    list(resumed.run())
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert resumed.optimizer.sam_steps == whole.optimizer.sam_steps > 0
