"""The training loop against the recipe written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from rst import RST, Constant
from rst.data import Augment, ImageData, train_batches
from rst.engine import Training
from rst.lr_schedule import constant, cosine, step

SEED, BATCH, L2, CLIP = 3, 4, 0.05, 0.7


def some_data(n=10, n_test=7):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n + n_test, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (n + n_test,), generator=generator)
    return ImageData(pixels[:n], labels[:n], pixels[n:], labels[n:], ("a", "b", "c"), (0.5,), (0.3,))


def some_model():
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers)


def training(model, method=None, **settings):
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    p = Constant(0.0 if method is None else 1.0)
    optimizer = RST(base, p, 100, module=model, seed=SEED, **(method or {}))
    arguments = {"epochs": 3, "batch_size": BATCH, "seed": SEED, "l2": L2, "clip_norm": CLIP} | settings
    return Training(model, optimizer, cosine, some_data(), Augment(), **arguments)


@pytest.mark.parametrize(
    "method", [None, {"rho": 0.3}, {"rho": 0.3, "gamma": 0.5}], ids=["sgd", "sam", "gnp"]
)
def test_the_recipe_written_out(method):
    """L2 inside the loss at the point where the gradient is taken, one clip of the final gradient, the
    learning rate per iteration, metrics of the clean pass."""
    model = some_model()
    theirs = copy.deepcopy(model)
    run = training(model, method)
    metrics = list(run.run())

    parameters = list(theirs.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True)
    total_steps = 3 * 2  # 10 images are two batches of 4: the last partial one is dropped
    t = 0
    for epoch in range(3):
        losses, correct = [], 0
        for x, y in train_batches(some_data(), BATCH, Augment(), SEED, epoch):

            def gradient(x=x, y=y):
                logits = theirs(x)
                loss = F.cross_entropy(logits, y)
                penalty = 0.5 * L2 * sum(p.square().sum() for p in parameters)
                return loss, logits, torch.autograd.grad(loss + penalty, parameters)

            loss, logits, g = gradient()
            losses.append(loss.item())
            correct += (logits.argmax(1) == y).sum().item()
            if method is not None:
                gamma = method.get("gamma", 1.0)
                norm = torch.stack([part.norm() for part in g]).norm()
                theta = [p.detach().clone() for p in parameters]
                for p, part in zip(parameters, g, strict=True):
                    p.data += method["rho"] * part / norm
                _, _, perturbed = gradient()
                for p, kept in zip(parameters, theta, strict=True):
                    p.data = kept
                g = [(1 - gamma) * a + gamma * b for a, b in zip(g, perturbed, strict=True)]
            norm = torch.stack([part.norm() for part in g]).norm()
            for p, part in zip(parameters, g, strict=True):
                p.grad = part * min(1.0, CLIP / norm)
            optimizer.param_groups[0]["lr"] = 0.5 * 0.5 * (1 + math.cos(math.pi * t / total_steps))
            optimizer.step()
            t += 1
        assert metrics[epoch]["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert metrics[epoch]["train_accuracy"] == correct / 8
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        # float32, six steps: rounding of the clip and of sums taken in another order.
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert metrics[-1]["lr"] == optimizer.param_groups[0]["lr"]
    assert metrics[-1]["propagations"] == (6 if method is None else 12)


def test_mixed_labels_reach_loss_and_accuracy():
    """The loss is the cross entropy with probabilities; the accuracy counts the image's own label."""
    model = some_model()
    theirs = copy.deepcopy(model)
    mixing = Augment(mixup=1.0)
    run = training(model, epochs=1, l2=0.0)
    run.augment = mixing
    (metrics,) = run.run()
    batches = list(train_batches(some_data(), BATCH, mixing, SEED, 0))
    own = [labels for _, labels in train_batches(some_data(), BATCH, Augment(), SEED, 0)]
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    losses, correct = [], 0
    for t, ((x, targets), y) in enumerate(zip(batches, own, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.5 * cosine(t / 2)
        logits = theirs(x)
        loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        correct += (logits.argmax(1) == y).sum().item()
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["train_accuracy"] == correct / 8


def test_evaluation_covers_the_whole_test_set():
    model = some_model()
    run = training(model, epochs=1)
    (metrics,) = run.run()
    data = some_data()
    with torch.no_grad():
        logits = model.eval()((data.test_images / 255 - 0.5) / 0.3)
    assert metrics["test_accuracy"] == (logits.argmax(1) == data.test_labels).sum().item() / 7
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resuming_continues_bit_for_bit(precision, tmp_path):
    def start():
        torch.manual_seed(0)
        layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
        return training(model, {"rho": 0.3, "gamma": 0.5}, precision=precision)

    whole = start()
    list(whole.run())
    first = start()
    epochs = first.run()
    next(epochs)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = start()
    torch.manual_seed(99)  # the global generator is of no account
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [metrics["epoch"] for metrics in second.run()] == [2, 3]
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert second.optimizer.propagations == 12


def test_a_loss_that_is_not_finite_names_its_step():
    run = training(some_model())
    with torch.no_grad():
        run.model[1].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 \(epoch 1\)"):
        next(run.run())
    assert run.metrics == []


def test_refuses_settings_that_cannot_be():
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'half'"):
        training(some_model(), precision="half")
    with pytest.raises(ValueError, match="does not commute with fp16"):
        training(some_model(), {"mix": "normalized"}, precision="fp16")
    with pytest.raises(ValueError, match="l2 must be at least 0"):
        training(some_model(), l2=-1.0)
    with pytest.raises(ValueError, match="clip_norm must be above 0"):
        training(some_model(), clip_norm=0.0)


def test_learning_rate_factors():
    assert [cosine(0.0), cosine(0.5), cosine(1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert [step(x) for x in (0.0, 0.49, 0.5, 0.75, 0.99)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert constant(0.7) == 1.0
