"""RST as timm's training script makes and drives it: `--opt rst`, and a loss scaler that gets a function.

python examples/timm_script.py --opt rst --opt-kwargs base=sgd "schedule=(0,1)" rho=0.05 --clip-grad 1
"""

import argparse
from functools import partial

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs

from rst.integrations import timm as rst_timm

EPOCHS, BATCH, CLASSES = 3, 16, 3


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = torch.randn(96, 3, 32, 32), torch.arange(96) % CLASSES  # stand for your data
    x[torch.arange(96), y] += 1
    model = timm.create_model(args.model, num_classes=CLASSES).to(device)
    updates = len(x) // BATCH

    rst_timm.register()
    optimizer = create_optimizer_v2(
        model, **optimizer_kwargs(args), total_steps=EPOCHS * updates, **args.opt_kwargs
    )
    amp_autocast = partial(torch.autocast, device.type, getattr(torch, args.amp_dtype))
    optimizer.module = model  # the DistributedDataParallel wrapper, where there is one
    loss_scaler = rst_timm.LossScaler(device.type, enabled=args.amp_dtype == "float16")
    lr_scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=updates)

    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):

            def _forward(batch: torch.Tensor = batch) -> torch.Tensor:
                with amp_autocast():
                    return torch.nn.functional.cross_entropy(model(x[batch].to(device)), y[batch].to(device))

            loss_scaler(_forward, optimizer, clip_grad=args.clip_grad, parameters=model.parameters())
        lr_scheduler.step(epoch + 1)
    accuracy = (model.eval()(x.to(device)).argmax(1).cpu() == y).float().mean()
    print(f"{optimizer.propagations} propagations, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--opt", default="rst")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--amp-dtype", default="bfloat16")
    main(parser.parse_args())
