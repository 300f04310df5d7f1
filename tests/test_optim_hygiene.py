"""What a SAM step leaves alone, the closures it takes, and the memory it takes."""

import gc
import itertools

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_close, assert_same_bits, batches, loss_of, network, sgd, state
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rst import RST, Constant, Linear

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


def sam(model: nn.Module, **rule) -> RST:
    """An optimizer whose every step is a SAM step."""
    return RST(sgd(model.parameters()), Constant(1.0), 100, module=model, **rule)


def settings(model: nn.Module) -> list[dict[str, object]]:
    """Each layer's flags and numbers, such as `training` and `momentum`."""
    simple = (bool, int, float, type(None))
    return [{k: v for k, v in vars(m).items() if isinstance(v, simple)} for m in model.modules()]


@GAMMAS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_statistics_are_the_clean_pass_s(gamma, momentum):
    """momentum=None averages over the batches counted so far, so the count must not move either."""
    model, clean = network(), network()
    for m in model, clean:
        m[1].momentum = momentum
    optimizer = sam(model, gamma=gamma, rho=1.0)
    for t in range(3):
        clean.load_state_dict(model.state_dict())
        torch.manual_seed(t)
        loss_of(clean, t)
        torch.manual_seed(t)
        optimizer.step(lambda t=t: loss_of(model, t))
        assert model[1].num_batches_tracked == t + 1
        assert_same_bits(list(model.buffers()), list(clean.buffers()))


def test_batchnorm_in_eval_mode_uses_its_statistics_in_both_passes():
    """A frozen layer inside a model in training."""
    model = network()
    model[1] = nn.BatchNorm1d(8, affine=False, dtype=torch.float64)
    for inputs in batches()[0][:5]:
        model(inputs)
    frozen = model[1].eval()
    mean, var = frozen.running_mean.clone(), frozen.running_var.clone()
    seen = []
    frozen.register_forward_hook(lambda layer, x, y: seen.append((x[0], y)))
    sam(model).gradient(lambda: loss_of(model, 0))
    assert len(seen) == 2
    for x, y in seen:
        torch.testing.assert_close(y, F.batch_norm(x, mean, var))
    assert not frozen.training
    assert model.training
    assert_same_bits(list(model.buffers())[:2], [mean, var])


def test_dropout_masks_are_equal_in_both_passes():
    model = network()
    masks = []
    model[3].register_forward_hook(lambda layer, x, y: masks.append(y == 0))
    optimizer = sam(model)
    for t in range(3):
        optimizer.step(lambda t=t: loss_of(model, t))
    first, second, third, fourth, *_ = masks
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    # 64 draws a mask: two independent ones agree with probability 0.625^64, 1e-13.
    assert not torch.equal(first, third)


@GAMMAS
def test_noise_goes_on_where_the_clean_pass_left_it(gamma):
    """Else the draws of a run would depend on which steps were SAM steps."""
    model = network()
    other = network()
    torch.manual_seed(5)
    loss_of(other, 0)
    noise = torch.get_rng_state()
    torch.manual_seed(5)
    sam(model, gamma=gamma).step(lambda: loss_of(model, 0))
    assert torch.equal(torch.get_rng_state(), noise)


@GAMMAS
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("fatal_pass", [1, 2])
def test_closure_that_raises(fatal_pass, after_backward, error, gamma):
    model, untouched = network(torch.float32), network(torch.float32)
    optimizer, other = sam(model, gamma=gamma, rho=1.0), sam(untouched, gamma=gamma, rho=1.0)
    for m, o in (model, optimizer), (untouched, other):
        torch.manual_seed(5)
        o.step(lambda m=m: loss_of(m, 0, torch.float32))
    before = settings(model)
    calls = itertools.count(1)

    def closure():
        fatal = next(calls) == fatal_pass
        if fatal and not after_backward:
            raise error("stop")
        loss = loss_of(model, 1, torch.float32)
        if fatal:
            raise error("stop")
        return loss

    with pytest.raises(error, match="stop"):
        optimizer.gradient(closure)
    assert_same_bits(list(model.parameters()), list(untouched.parameters()))
    assert settings(model) == before
    assert not any(p._backward_hooks for p in model.parameters())
    assert (optimizer.steps, optimizer.sam_steps, optimizer.propagations) == (1, 1, 2)
    with pytest.raises(RuntimeError, match="gradient"):
        optimizer.step()

    # The failed attempt leaves nothing behind in the next one, BatchNorm's own clean pass apart.
    model.load_state_dict(untouched.state_dict())
    for m, o in (model, optimizer), (untouched, other):
        torch.manual_seed(6)
        o.step(lambda m=m: loss_of(m, 1, torch.float32))
    assert_same_bits(state(model), state(untouched))


@GAMMAS
@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("where", ["everywhere", "one entry"])
def test_infinite_gradient(where, adaptive, mix, gamma):
    """θ + ε is nan then. Neither θ nor the running statistics may keep any of it."""
    model, clean = network(torch.float32), network(torch.float32)
    torch.manual_seed(5)
    loss_of(clean, 0, torch.float32)

    def closure():
        loss = loss_of(model, 0, torch.float32)
        for p in model.parameters() if where == "everywhere" else [model[4].weight]:
            p.grad.view(-1)[0] = torch.inf
        return loss

    optimizer = sam(model, adaptive=adaptive, mix=mix, gamma=gamma)
    torch.manual_seed(5)
    optimizer.gradient(closure)
    assert_same_bits(state(model), state(clean))
    # GradScaler and clip_grad_norm_ must be able to see it.
    assert not model[4].weight.grad.isfinite().all()


@GAMMAS
@pytest.mark.parametrize("mix", ["gradient", "normalized"])
def test_gradient_missing_in_one_pass(mix, gamma):
    """A missing gradient counts as zero; a parameter that no pass reaches keeps None and is not decayed."""

    def setting():
        torch.manual_seed(0)
        sizes = {"both": 4, "clean_only": 3, "perturbed_only": 3, "neither": 1}
        model = nn.ParameterDict({k: torch.randn(n, dtype=torch.float64) for k, n in sizes.items()})
        calls = itertools.count()

        def closure():
            reached = model["clean_only"] if next(calls) % 2 == 0 else model["perturbed_only"]
            loss = model["both"].sin().sum() * reached.cos().prod()
            loss.backward()
            return loss

        return model, closure

    twin, twin_closure = setting()
    model, closure = setting()
    optimizer = sam(model, gamma=gamma, mix=mix)
    params = list(twin.parameters())
    for _ in range(2):
        before = state(model)
        expected = reference.gradient(
            twin, params, twin_closure, sam=True, rho=[0.1] * 4, gamma=gamma, mix=mix
        ).g
        optimizer.zero_grad()
        optimizer.gradient(closure)
        assert_same_bits(state(model), before)
        assert [x is None for x in expected].count(True) == 1
        for p, x in zip(model.parameters(), expected, strict=True):
            assert (p.grad is None) == (x is None)
            if x is not None:
                torch.testing.assert_close(p.grad, x, rtol=1e-12, atol=1e-12)
    neither = model["neither"].clone()
    optimizer.step()
    assert torch.equal(model["neither"], neither)


@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_zero_gradient_has_no_perturbation(adaptive, mix):
    model = network(torch.float32)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in model.parameters()])
        loss = 0 * model(batches(torch.float32)[0][0]).sum()
        loss.backward()
        return loss

    sam(model, adaptive=adaptive, mix=mix, gamma=0.5).gradient(closure)
    assert_same_bits(seen[0], seen[1])
    assert all((p.grad == 0).all() for p in model.parameters())


ZEROING = {
    "optimizer.zero_grad()": lambda optimizer, model: optimizer.zero_grad(),
    "base.zero_grad()": lambda optimizer, model: optimizer.base.zero_grad(),
    "model.zero_grad()": lambda optimizer, model: model.zero_grad(),
}


@GAMMAS
@pytest.mark.parametrize("zero", ZEROING)
def test_closure_that_zeroes_gradients(zero, gamma):
    """PyTorch's documented idiom. It makes no difference."""
    model, other = network(), network()
    optimizer = RST(sgd(model.parameters()), Constant(0.5), 10, gamma=gamma, module=model)
    plain = RST(sgd(other.parameters()), Constant(0.5), 10, gamma=gamma, module=other)

    def closure(t):
        ZEROING[zero](optimizer, model)
        return loss_of(model, t)

    torch.manual_seed(5)
    for t in range(10):
        optimizer.step(lambda t=t: closure(t))
    torch.manual_seed(5)
    for t in range(10):
        plain.step(lambda t=t: loss_of(other, t))
    assert 0 < optimizer.sam_steps < 10
    assert_close(state(model), state(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_closure_that_zeroes_in_place_is_refused(gamma):
    model = network()
    optimizer = sam(model, gamma=gamma)
    before = state(model)[: len(list(model.parameters()))]

    def closure():
        model.zero_grad(set_to_none=False)
        return loss_of(model, 0)

    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.gradient(closure)
    assert_same_bits(list(model.parameters()), before)
    assert optimizer.steps == 0
    optimizer.step(lambda: loss_of(model, 0))


def test_gradients_of_another_backward_are_refused():
    model = network()
    optimizer = sam(model)
    loss_of(model, 0)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step(lambda: loss_of(model, 0))
    optimizer.zero_grad()
    optimizer.step(lambda: loss_of(model, 0))


@GAMMAS
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_accumulation_over_micro_batches(adaptive, gamma):
    """The closure's own loop over quarters of the batch is the batch: a sum in another order."""
    inputs, labels = batches()
    whole, parts = network(plain=True), network(plain=True)
    optimizers = [
        RST(sgd(m.parameters()), Linear(0.2, 1.0), 20, gamma=gamma, adaptive=adaptive, module=m)
        for m in (whole, parts)
    ]

    def accumulate(t):
        total = 0.0
        for x, y in zip(inputs[t].split(2), labels[t].split(2), strict=True):
            loss = F.cross_entropy(parts(x), y) / 4
            loss.backward()
            total += loss.detach()
        return total

    for t in range(20):
        a = optimizers[0].step(lambda t=t: loss_of(whole, t))
        b = optimizers[1].step(lambda t=t: accumulate(t))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert 0 < optimizers[0].sam_steps < 20
    assert_close(state(parts), state(whole))


def peak_bytes(work) -> int:
    """Most bytes that torch's CPU allocator held at once beyond those before, by the profiler's records."""
    gc.collect()  # else garbage of earlier tests, freed during `work`, would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    events = [e for e in records.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("batch", [4, 1024], ids=["weights dominate", "activations dominate"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"gamma": 0.5}, {"gamma": 2.0, "mix": "normalized"}, {"gamma": 0.5, "adaptive": True}],
    ids=["sam", "gnp", "normalized", "asam"],
)
def test_extra_memory_is_one_copy_of_the_parameters(rule, batch):
    """Against SGD that keeps its gradients' memory between steps, as accumulating gradients does.

    If SGD frees them instead, it has none while activations are at their peak, but a SAM step still needs
    ∇L(θ) then. Two steps from a fresh model each, so that whatever is allocated once is counted. The slack,
    32 KiB beside 4 MiB, is for random number states and scalars.
    """
    layers, width = 16, 256
    inputs = torch.randn(batch, width)

    def build():
        torch.manual_seed(0)
        linear = (nn.Linear(width, width, bias=False) for _ in range(layers))
        return nn.Sequential(*(m for layer in linear for m in (layer, nn.Tanh())))

    def closure(model):
        loss = model(inputs).square().mean()
        loss.backward()
        return loss.detach()

    def plain(model):
        base = sgd(model.parameters())
        for _ in range(2):
            base.zero_grad(set_to_none=False)
            closure(model)
            base.step()

    def sharpness_aware(model):
        optimizer = sam(model, **rule)
        for _ in range(2):
            optimizer.step(lambda: closure(model))

    parameters = 4 * layers * width**2
    models = build(), build()
    extra = peak_bytes(lambda: sharpness_aware(models[0])) - peak_bytes(lambda: plain(models[1]))
    assert 0 < extra <= parameters + 2**15
