"""Which device a run computes on, in a sweep one GPU a run, and in which precision."""

import ctypes
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rst.training import distributed

log = logging.getLogger(__name__)

# What autocast casts to, if anything.
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is any, else Apple's GPU, else the CPU.

    Raises:
        ValueError: for a device that is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # what follows is paragraphs long
        raise ValueError(f"device={name} cannot be used ({reason}); try device=auto") from error
    return device


@contextmanager
def lease(name: str, wait: bool) -> Iterator[torch.device]:
    """`pick_device`, where "auto" and "cuda" mean a GPU that no other run of this user has leased.

    So n jobs of a sweep fill n GPUs, and further ones wait their turn. With `wait` false, a run started by
    hand, it takes the first GPU where all are leased. "cuda:1" is that one, leased or not. Under torchrun it
    is the rank's own, not leased.
    """
    if distributed.is_launched():
        name = distributed.device_of_rank(name)
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        device = pick_device(name)
        # Current, as it is where PyTorch records events and pins memory.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield device
        return
    # By UUID, as numbers follow CUDA_VISIBLE_DEVICES, which differs between processes.
    ids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    folder = Path(tempfile.gettempdir()) / f"rst-devices-{os.getuid()}"
    with first_free(folder, ids, wait) as index, torch.cuda.device(index or 0):
        yield torch.device("cuda", index or 0)


@contextmanager
def first_free(folder: Path, ids: Sequence[str], wait: bool, poll: float = 1.0) -> Iterator[int | None]:
    """The index of the first of `ids` whose lock in `folder` nobody holds, held meanwhile; None where all are
    held and `wait` is false. `poll`: seconds between attempts. A process that dies gives its lock back."""
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"{name}.lock") for name in ids]
    told = False
    while (index := next((i for i, lock in enumerate(locks) if _try(lock)), None)) is None and wait:
        if not told:
            log.info("all %d GPUs are in use: waiting for one", len(ids))
            told = True
        time.sleep(poll)
    try:
        yield index
    finally:
        if index is not None:
            locks[index].release()


def _try(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def allow_tf32(allowed: bool) -> None:
    """Whether NVIDIA GPUs may round the factors of fp32 products to TensorFloat-32's 10 bits, in matrix
    products and convolutions alike. PyTorch's default is no for the former and yes for the latter."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step: by default it gives large blocks back to the
    system, and a CPU step then spends a tenth of its time on page faults. Elsewhere than on Linux with glibc
    nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, in bytes: the most that is not a mapping of its own. Older versions allow 32 MiB.
        if not libc.mallopt(-3, 2**30):
            libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory that is kept


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Run with that many threads (None: as many as now) and set the former number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
