"""RST in the Trainer of Hugging Face transformers."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rst.optim import RST


class RSTMixin:
    """Gives a `transformers.Trainer`, or a subclass of it, RST around the optimizer that it would create.

        class RSTTrainer(RSTMixin, Trainer):
            pass

        trainer = RSTTrainer(model, args, train_dataset=..., rst={"schedule": Linear(0.0, 1.0), "rho": 0.05})

    The micro-batches of a step (`gradient_accumulation_steps`) are propagated together when the last of them
    has arrived. Gradients are unscaled and clipped once; logged losses are the clean pass's. Checkpoints hold
    RST's counters, so `train(resume_from_checkpoint=...)` goes on where the run was.

    Args:
        rst: arguments of RST other than the base, `total_steps` and `module`, which the Trainer knows. None
            where an RST is given as `optimizers=(optimizer, scheduler)`.

    Raises:
        ValueError: when training begins, where there is neither `rst` nor an RST, with DeepSpeed, and for a
            model that RST cannot train.
    """

    model: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, rst: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.rst = rst
        self._micro_batches: list[Any] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled:
            raise ValueError("RST does not work with DeepSpeed: use DistributedDataParallel or FSDP2")
        optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        optimizer = _unwrapped(optimizer)  # of Accelerate's wrapper, when train() is called again
        if self.rst is not None:
            bases = optimizer.bases if isinstance(optimizer, RST) else optimizer
            optimizer = RST(bases, total_steps=self.state.max_steps, module=self.model, **self.rst)
        elif not isinstance(optimizer, RST):
            raise ValueError("RSTMixin needs RST's arguments, such as rst={'schedule': Linear(0.0, 1.0)}")
        self.optimizer = optimizer
        self._micro_batches.clear()
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:  # more of them belong to this step
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        optimizer = _unwrapped(self.optimizer)
        if optimizer.module is not model:  # now it is wrapped
            optimizer.module = model
        step = super().training_step  # type: ignore[misc]

        def propagate() -> Tensor:
            loss = torch.zeros((), device=self.args.device)
            for i, micro_batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss += step(model, micro_batch, num_items_in_batch)
            return loss

        return optimizer.gradient(propagate)


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
