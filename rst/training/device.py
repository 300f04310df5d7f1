"""The device of a run, in a sweep one GPU per run, and its precision, threads and memory."""

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

# The type that autocast casts to, if any.
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA if available, else Apple's GPU, else the CPU.

    Raises:
        ValueError: the device is unknown or not available.
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
    """`pick_device`, with "auto" and "cuda" meaning a GPU that no other run of this user has leased.

    So n jobs of a sweep fill n GPUs, and further ones wait for their turn. If all are leased and `wait` is
    false, as for a run started by hand, it is the first one. "cuda:1" is that GPU, leased or not. Under
    torchrun each rank has its own, without a lease.
    """
    if distributed.is_launched():
        name = distributed.device_of_rank(name)
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        device = pick_device(name)
        # Make it current: PyTorch records events and pins memory on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield device
        return
    # By UUID, as CUDA_VISIBLE_DEVICES, which differs between processes, changes the numbers.
    ids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    folder = Path(tempfile.gettempdir()) / f"rst-devices-{os.getuid()}"
    with first_free(folder, ids, wait) as index, torch.cuda.device(index or 0):
        yield torch.device("cuda", index or 0)


@contextmanager
def first_free(folder: Path, ids: Sequence[str], wait: bool, poll: float = 1.0) -> Iterator[int | None]:
    """Hold the lock in `folder` of the first of `ids` that nobody holds, and give its index; None if all are
    held and `wait` is false. A process that dies releases its lock.

    Args:
        poll: seconds between attempts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"{name}.lock") for name in ids]
    has_logged = False
    while (index := next((i for i, lock in enumerate(locks) if _try(lock)), None)) is None and wait:
        if not has_logged:
            log.info("all %d GPUs are in use: waiting for one", len(ids))
            has_logged = True
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
    """Whether NVIDIA GPUs may round the factors of fp32 products to TensorFloat-32's 10 bits, in both matrix
    products and convolutions. PyTorch's default is no for the former and yes for the latter."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step: by default it returns large blocks to the system, and a
    step on a CPU then spends a tenth of its time on page faults. Does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD: larger blocks, in bytes, get a mapping of their own. Older versions allow 32 MiB.
        if not libc.mallopt(-3, 2**30):
            libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory that is kept


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Use that many threads (None: as many as now) within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
