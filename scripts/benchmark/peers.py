"""What the benchmark compares with: other SAMs, a plain DataLoader, another commit of this optimizer."""

import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from rst.data import Augment, ImageData

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # CIFAR-10's


def random_data(n: int, n_test: int = 1) -> ImageData:
    """Smooth images: AutoAugment takes other paths on noise than on photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (n + n_test, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = F.interpolate(coarse.float(), size=32, mode="bilinear").byte()
    labels = torch.randint(10, (n + n_test,), generator=generator)
    return ImageData(images[:n], labels[:n], images[n:], labels[n:], tuple("0123456789"), MEAN, STD)


@torch.no_grad()
def hand_written_sam_step(base: torch.optim.Optimizer, closure: Callable[[], object], rho: float) -> None:
    """A SAM step as most people write it, after github.com/davda54/sam: loops over the parameters."""
    base.zero_grad()
    with torch.enable_grad():
        closure()
    parameters = [p for group in base.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.add_(p.grad * (rho / (norm + 1e-12)))
    base.zero_grad()
    with torch.enable_grad():
        closure()
    for p, weights in zip(parameters, kept, strict=True):
        p.data = weights
    base.step()


def pytorch_optimizer_step(sam: pytorch_optimizer.SAM, closure: Callable[[], object]) -> None:
    closure()
    sam.first_step(zero_grad=True)
    closure()
    sam.second_step(zero_grad=True)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Like torchvision's CIFAR10: images in memory, each made a PIL image and transformed by itself."""

    def __init__(self, images: Any, labels: Tensor, augment: Augment) -> None:
        self.pixels, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        steps: list[Any] = []
        if augment.crop_padding:
            steps.append(
                transforms.RandomCrop(images.shape[-1], augment.crop_padding, padding_mode="reflect")
            )
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if augment.autoaugment:
            steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy(augment.autoaugment)))
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain_loader(
    images: Any, labels: Tensor, augment: Augment, batch_size: int, workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        PlainImages(images, labels, augment),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def optimizer_at(commit: str, repository: Path) -> type:
    """`RST` as it was at `commit`, with the modules it used then, beside the one that is imported already.

    Raises:
        subprocess.CalledProcessError: where there is no such commit, or no rst/ in it.
    """
    archive = subprocess.run(
        ["git", "-C", str(repository), "archive", commit, "rst"], capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        today = _forget_rst()
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            return importlib.import_module("rst.optim").RST
        finally:
            sys.path.remove(folder)
            _forget_rst()
            sys.modules.update(today)


def _forget_rst() -> dict[str, Any]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "rst"}
