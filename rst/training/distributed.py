"""One run on several devices, with a process (rank) for each, as `torchrun` starts them."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# How long ranks wait for one that is silent, because its machine lost its network, say. That a process died
# is noticed at once: by gloo, and by torchrun, which ends the others, after 30 s by force.
TIMEOUT = timedelta(minutes=10)


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this is rank 0, which writes and reports."""
    return not is_launched() or os.environ["RANK"] == "0"


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def device_of_rank(name: str) -> str:
    """The device of this rank for the name "auto", "cuda" or "cpu": the GPU of its number on the machine.

    Raises:
        ValueError: another name, or fewer GPUs than ranks on the machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ValueError(f"under torchrun device must be auto, cuda or cpu, got {name}")
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "cpu" or not torch.cuda.is_available():
        return name
    if local_ranks > torch.cuda.device_count():
        raise ValueError(
            f"torchrun started {local_ranks} processes for {torch.cuda.device_count()} GPUs: "
            f"use --nproc_per_node={torch.cuda.device_count()}"
        )
    return f"cuda:{local_rank}"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks; does nothing in a process that torchrun did not start.

    Raises:
        ConnectionError: another rank has ended.
    """
    if not is_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            cause = str(error).splitlines()[0]
            raise ConnectionError(f"another rank has ended or cannot be reached: {cause}") from error
        raise
    # Not after an error: the others may be waiting in a collective, and this process is about to end.
    dist.barrier()  # none leaves while another is still training
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks() > 1:
        dist.barrier()


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with rank 0's weights, and with gradients averaged over the ranks."""
    if ranks() == 1:
        return model
    # Buffers are left to `share_buffers`; newer versions of PyTorch call that option by another name.
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{option: False},  # type: ignore[arg-type]
    )


def any_rank(flag: bool, device: torch.device) -> bool:
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device))) if ranks() > 1 else flag


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which are saved. BatchNorm's running statistics, for one, are of
    each rank's own images."""
    if ranks() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def require_equal(number: int, message: str) -> None:
    """Raises ValueError with `message` on every rank if they have different numbers."""
    if ranks() > 1:
        numbers: list[int | None] = [None] * ranks()
        dist.all_gather_object(numbers, number)
        if len(set(numbers)) > 1:
            raise ValueError(f"{message}: {numbers}")
