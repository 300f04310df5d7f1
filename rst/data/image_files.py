"""Images that stay in files and are decoded, by worker processes, when a batch needs them."""

import io
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_all_start_methods, get_context
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CPU = torch.device("cpu")
MOST_WORKERS = 256  # each takes memory of its own: thousands of them would take all there is
# These ask a run to end, which the main process does in order.
FOR_MAIN_PROCESS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Place(NamedTuple):
    """Where an image is: a file, or `size` bytes at an offset in a tar file. `name` is its path within a tar
    file or a folder of classes, where that matters."""

    file: str
    name: str = ""
    offset: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return self.file if self.size is None else f"{self.file}:{self.name}"

    def read(self) -> IO[bytes]:
        with open(self.file, "rb") as file:  # opened anew: a shared one would be moved by other workers
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def is_image(name: str, extensions: tuple[str, ...]) -> bool:
    """Whether a file has one of these extensions and is not hidden."""
    return name.lower().endswith(extensions) and not os.path.basename(name).startswith(".")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files, standing where an array of uint8 [N, C, H, W] would.

    Args:
        places: of all images, as parts of them share it.
        indices: which of the places have these images.
        size: (height, width) of an image when it is ready.
        fit: an image to that size, for evaluation and for training without random crops. Called in worker
            processes.
        mode: PIL's, "RGB" or "L".
        workers: processes that decode; 0 decodes in this one, None takes as many as this process may use
            cores, 16 at most.
        interpolation: of a random crop to `size`, "bilinear" or "bicubic".
    """

    places: Sequence[Place]
    indices: Tensor
    size: tuple[int, int]
    fit: Callable[[Image.Image], Image.Image]
    mode: str = "RGB"
    workers: int | None = None
    interpolation: str = "bilinear"
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers must be from 0 to {MOST_WORKERS}, or null, got {self.workers}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.indices), 3 if self.mode == "RGB" else 1, *self.size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor | slice) -> "ImageFiles":
        return replace(self, indices=self.indices[chosen])

    def to(self, device: torch.device | str) -> "ImageFiles":
        return replace(self, device=torch.device(device))

    def batches(self, batches: Sequence[Tensor], crops: Tensor | None) -> Iterator[Tensor]:
        """The images of each batch of indices into this, uint8 [B, C, H, W] on the device.

        `crops` [N], where given: the seed of each image's random-resized crop.

        Raises:
            ValueError: naming a file that cannot be decoded.
        """
        workers = min(16, cpu_count()) if self.workers is None else self.workers
        loader = DataLoader(
            _Items(self, crops is not None),
            batch_sampler=_Batches(batches, crops),
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
        for images in _ahead(_from_workers(loader) if workers else iter(loader), self.device):
            if isinstance(images, Exception):
                raise images
            yield images


def _context() -> BaseContext:
    """The platform's own way to start processes. joblib's, the default within its processes, cannot do it."""
    return get_context(get_all_start_methods()[0])


def _from_workers(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        ChildProcessError: where a batch is waited for whose worker has died; it may take 5 seconds to notice.
            PyTorch would raise it from a handler of SIGCHLD, at once but wherever the main thread is: while
            the other workers are being told to end, say, which they then never are.
    """
    others, on_death = active_children(), signal.getsignal(signal.SIGCHLD)
    # Until `_begin_worker` has dealt with them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, *FOR_MAIN_PROCESS))
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if signal.getsignal(signal.SIGCHLD) is not on_death:  # set by the process's first loader
            signal.signal(signal.SIGCHLD, on_death)
    workers = [process for process in active_children() if process not in others]
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError):
        ended = wait([worker.sentinel for worker in workers], timeout=1)  # a connection breaks before
        for worker in workers:
            if worker.sentinel in ended:
                worker.join()
                raise _death(worker.exitcode or 0) from None
        raise


def _death(exit_code: int) -> ChildProcessError:
    """What a user can do about it."""
    how = f"exited with {exit_code}" if exit_code >= 0 else f"was killed: {signal.strsignal(-exit_code)}"
    hint = {
        -signal.SIGBUS: "shared memory is full: enlarge /dev/shm, or set dataset.workers=0, which needs none",
        -signal.SIGKILL: "probably for lack of memory: use fewer dataset.workers",
    }.get(exit_code, "with dataset.workers=0 the main process decodes, and its error says more")
    return ChildProcessError(f"a process that decodes images {how}; {hint}")


def _begin_worker(parent: int, number: int) -> None:
    """What PyTorch's workers leave out. They end with their parent, but only if they saw it alive. And the
    signals that ask a run to end are for the main process, which ends in order and needs the batch it waits
    for: a terminal, `timeout` and torchrun send them to its whole process group, which workers leave; Slurm
    may send USR1 and USR2 to every process, so workers ignore them.

    A SIGTERM of its own must end a worker, and does by PyTorch's handler: `multiprocessing` sends it, when
    the main process exits, to workers that nobody told to end, and waits for them without a limit.
    """
    if os.getppid() != parent:
        os._exit(1)
    os.setpgrp()
    for signal_number in FOR_MAIN_PROCESS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, *FOR_MAIN_PROCESS))


def open_image(place: Place, mode: str = "RGB") -> Image.Image:
    """Raises ValueError naming the file where it cannot be decoded, truncated ones included."""
    try:
        with Image.open(place.read()) as image:
            require_eight_bits(image)
            return image.convert(mode)
    except Exception as error:  # a damaged file raises whatever its decoder trips over
        raise ValueError(f"cannot decode {place}: {error}") from error


def require_eight_bits(image: Image.Image) -> None:
    """Raises ValueError where a channel has more: converted to RGB, such an image would be mostly white."""
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel")


class _Items(Dataset):
    """Image and crop by (index, seed): what a worker does is a function of these two alone."""

    def __init__(self, files: ImageFiles, cropped: bool) -> None:
        self.files = files
        self.crop = (
            RandomResizedCropAndInterpolation(files.size, interpolation=files.interpolation)
            if cropped
            else None
        )

    def __getitem__(self, item: tuple[int, int]) -> np.ndarray | Exception:
        index, seed = item
        files = self.files
        try:
            image = open_image(files.places[int(files.indices[index])], files.mode)
        except ValueError as error:
            return error  # raised, it would reach the user within a worker's traceback
        if self.crop is None:
            return np.asarray(files.fit(image))
        before = random.getstate()
        random.seed(seed)  # timm's crop draws from it
        try:
            return np.asarray(self.crop(image))
        finally:
            random.setstate(before)


class _Batches:
    """The (index, seed) pairs of each batch, made as the loader asks for them."""

    def __init__(self, batches: Sequence[Tensor], crops: Tensor | None) -> None:
        self.batches, self.crops = batches, crops

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for chosen in self.batches:
            seeds = torch.zeros_like(chosen) if self.crops is None else self.crops[chosen]
            yield list(zip(chosen.tolist(), seeds.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.batches)


def _stack(items: list[np.ndarray | Exception]) -> Tensor | Exception:
    """[H, W, 3] or [H, W] each to [B, C, H, W]; the first error, where there is one."""
    arrays = []
    for item in items:
        if isinstance(item, Exception):
            return item
        arrays.append(item)
    images = torch.from_numpy(np.stack(arrays))
    return images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]


def _ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The batches on the device; on CUDA the next one's transfer overlaps the work on this one."""
    if device.type != "cuda":
        for item in batches:
            yield item.to(device) if isinstance(item, Tensor) else item
        return
    transfers = torch.cuda.Stream(device)

    def begin(item: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(transfers):
            item = item.to(device, non_blocking=True) if isinstance(item, Tensor) else item
            return item, transfers.record_event()

    def end(item: Any, transferred: torch.cuda.Event) -> Any:
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(transferred)
        if isinstance(item, Tensor):
            item.record_stream(consumer)  # its memory must not be reused while the consumer still reads it
        return item

    waiting = None
    for item in batches:
        begun = begin(item)
        if waiting is not None:
            yield end(*waiting)
        waiting = begun
    if waiting is not None:
        yield end(*waiting)
