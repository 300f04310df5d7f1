"""The loop over `passes()`: what it yields, and every way to leave or misuse it."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import WAYS, assert_close, assert_same_bits, batches, loss_of, network, sgd, state, take_steps
from torch import nn

from rst import RST, Linear

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


def rst(model: nn.Module, p: float = 1.0, **rule) -> RST:
    return RST(sgd(model.parameters()), p, 100, module=model, **rule)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_each_pass_is_named_and_has_its_weights(adaptive):
    """θ in the clean pass, θ + ε in the perturbed one, with ε by `reference`; θ again after the loop."""
    model = network(plain=True)
    theta = [p.detach().clone() for p in model.parameters()]
    optimizer = rst(model, rho=0.5, adaptive=adaptive)
    seen, gradients = {}, {}
    for which in optimizer.passes():
        seen[which] = [p.detach().clone() for p in model.parameters()]
        loss_of(model, 0)
        gradients[which] = [p.grad.clone() for p in model.parameters()]
    assert list(seen) == ["clean", "perturbed"]
    assert_same_bits(seen["clean"], theta)
    epsilon = reference.perturbation(theta, gradients["clean"], [0.5] * len(theta), adaptive)
    assert_close(seen["perturbed"], [t + e for t, e in zip(theta, epsilon, strict=True)])
    assert_same_bits(list(model.parameters()), theta)


def test_parameters_that_share_memory_come_back():
    """In different groups: the second was moved by the first."""
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight.data = embedding.weight.data
    groups = [{"params": [embedding.weight], "weight_decay": 0.0}, {"params": [head.weight]}]
    optimizer = RST(torch.optim.SGD(groups, lr=0.1), 1.0, 10, rho=0.5)
    theta, seen = embedding.weight.detach().clone(), []
    for _ in optimizer.passes():
        seen.append(embedding.weight.detach().clone())
        F.cross_entropy(head(embedding(torch.tensor([0, 1]))), torch.tensor([1, 2])).backward()
    assert not torch.equal(seen[1], theta)
    assert_same_bits([embedding.weight], [theta])


def test_a_plain_step_has_the_clean_pass_alone():
    model = network()
    optimizer = rst(model, p=0.0)
    names = []
    for which in optimizer.passes():
        names.append(which)
        loss_of(model, 0)
    assert names == ["clean"]


@GAMMAS
def test_all_ways_give_the_same_bits(gamma):
    """With BatchNorm and dropout."""
    models = [network(torch.float32) for _ in WAYS]
    for model, way in zip(models, WAYS.values(), strict=True):
        torch.manual_seed(5)
        optimizer = RST(sgd(model.parameters()), Linear(0.2, 1.0), 20, gamma=gamma, module=model)
        take_steps(model, optimizer, 20, dtype=torch.float32, way=way)
    assert_same_bits(state(models[0]), state(models[1]))
    assert_same_bits(state(models[0]), state(models[2]))


@GAMMAS
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_accumulation_over_micro_batches(adaptive, gamma):
    """A loop over quarters of the batch in the body is the batch: a sum in another order."""
    inputs, labels = batches()
    whole, parts = network(plain=True), network(plain=True)
    optimizers = [
        RST(sgd(m.parameters()), Linear(0.2, 1.0), 20, gamma=gamma, adaptive=adaptive, module=m)
        for m in (whole, parts)
    ]
    for t in range(20):
        optimizers[0].step(lambda t=t: loss_of(whole, t))
        for _ in optimizers[1].passes():
            for x, y in zip(inputs[t].split(2), labels[t].split(2), strict=True):
                (F.cross_entropy(parts(x), y) / 4).backward()
        optimizers[1].step()
    assert 0 < optimizers[1].sam_steps < 20
    assert_close(state(parts), state(whole))


def test_a_gradient_is_used_once():
    """It stays for those who look at it after the step, and the next loop begins without it."""
    model = network()
    optimizer = rst(model)
    for t in range(2):
        optimizer.step(lambda t=t: loss_of(model, t))
        assert all(p.grad is not None for p in model.parameters())
        before = state(model)
        with pytest.raises(RuntimeError, match="no gradient"):
            optimizer.step()
        assert_same_bits(state(model), before)
    next(optimizer.passes())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("zero", [False, True], ids=["added", "anew"])
def test_gradients_of_a_backward_after_a_step_are_refused(zero):
    """Whether they were added to those that the step has used, or are new ones."""
    model = network(plain=True)
    optimizer = rst(model)
    optimizer.step(lambda: loss_of(model, 0))
    if zero:
        model.zero_grad()
    model[0].weight.sum().backward()
    grad = model[0].weight.grad.clone()
    for attempt in (lambda: next(optimizer.passes()), optimizer.step):
        with pytest.raises(RuntimeError, match=r"backward\(\).*passes\(\)"):
            attempt()
    assert torch.equal(model[0].weight.grad, grad)
    assert optimizer.steps == 1
    optimizer.zero_grad()
    optimizer.step(lambda: loss_of(model, 1))


def run(optimizer, body):
    """A loop that the body leaves by returning true or by raising."""
    for which in optimizer.passes():
        if body(which):
            return


def leave_by_break(optimizer, body):
    for which in optimizer.passes():
        if body(which):
            break


def leave_by_return(optimizer, body):
    run(optimizer, body)


def stopping(body, error):
    def raising(which):
        if body(which):
            raise error("stop")

    return raising


def leave_by_error(optimizer, body):
    with pytest.raises(ValueError, match="stop"):
        run(optimizer, stopping(body, ValueError))


def leave_by_interrupt(optimizer, body):
    with pytest.raises(KeyboardInterrupt):
        run(optimizer, stopping(body, KeyboardInterrupt))


def leave_by_error_in_a_closure(optimizer, body):
    names = iter(["clean", "perturbed"])
    with pytest.raises(ValueError, match="stop"):
        optimizer.gradient(lambda: stopping(body, ValueError)(next(names)))


LEAVING = [leave_by_break, leave_by_return, leave_by_error, leave_by_interrupt, leave_by_error_in_a_closure]


def settings(model: nn.Module) -> list[dict[str, object]]:
    """Each layer's flags and numbers, such as `training` and `momentum`."""
    simple = (bool, int, float, type(None))
    return [{k: v for k, v in vars(m).items() if isinstance(v, simple)} for m in model.modules()]


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("after_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("p", "last_pass"), [(0.0, "clean"), (1.0, "clean"), (1.0, "perturbed")])
@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_leaving_the_loop(leave, p, last_pass, after_backward, gamma):
    """θ is back, buffers and random numbers are as the clean pass left them, and the step does not count."""
    model, clean = network(torch.float32), network(torch.float32)
    clean.true_gradient = model.true_gradient = False
    optimizer = rst(model, p, gamma=gamma, rho=1.0)
    torch.manual_seed(5)
    optimizer.step(lambda: loss_of(model, 0, torch.float32))
    clean.load_state_dict(model.state_dict())
    before, counters = settings(model), (optimizer.steps, optimizer.sam_steps, optimizer.propagations)
    torch.manual_seed(6)
    if (last_pass, after_backward) != ("clean", False):
        loss_of(clean, 1, torch.float32)
        clean.zero_grad()
    noise = torch.get_rng_state()

    def body(which):
        if which != last_pass or after_backward:
            loss_of(model, 1, torch.float32)
        return which == last_pass

    torch.manual_seed(6)
    leave(optimizer, body)
    assert_same_bits(state(model), state(clean))
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(q.grad is None and not q._backward_hooks for q in model.parameters())
    assert settings(model) == before
    assert (optimizer.steps, optimizer.sam_steps, optimizer.propagations) == counters
    assert not optimizer.has_gradient
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()

    # The attempt leaves nothing behind in the next step.
    other = rst(clean, p, gamma=gamma, rho=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in (model, optimizer), (clean, other):
        torch.manual_seed(7)
        o.step(lambda m=m: loss_of(m, 2, torch.float32))
    assert_same_bits(state(model), state(clean))


@GAMMAS
@pytest.mark.parametrize("missing", ["clean", "perturbed"])
def test_a_body_without_backward(missing, gamma):
    model = network()
    optimizer = rst(model, gamma=gamma)
    theta = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        run(optimizer, lambda which: which != missing and loss_of(model, 0) is None)
    assert_same_bits(list(model.parameters()), theta)
    assert optimizer.steps == 0
    optimizer.step(lambda: loss_of(model, 0))


@GAMMAS
@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_passes_within_passes(where, gamma):
    model = network()
    optimizer = rst(model, gamma=gamma)
    theta = [p.detach().clone() for p in model.parameters()]

    def body(which):
        loss_of(model, 0)
        if which == where:
            optimizer.gradient(lambda: loss_of(model, 0))

    with pytest.raises(RuntimeError, match="within a loop"):
        run(optimizer, body)
    assert_same_bits(list(model.parameters()), theta)
    assert optimizer.steps == 0
    optimizer.step(lambda: loss_of(model, 0))


@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_step_within_the_loop(where):
    model = network()
    optimizer = rst(model)
    theta = [p.detach().clone() for p in model.parameters()]

    def body(which):
        loss_of(model, 0)
        if which == where:
            optimizer.step()

    with pytest.raises(RuntimeError, match="passes"):
        run(optimizer, body)
    assert_same_bits(list(model.parameters()), theta)
    assert optimizer.steps == 0


def test_an_iterator_that_is_kept_unfinished():
    """It holds θ + ε until it is closed or freed, or the next loop begins, which says so."""
    model = network()
    optimizer = rst(model, rho=1.0)
    theta = [p.detach().clone() for p in model.parameters()]
    kept = optimizer.passes()
    for which in kept:
        loss_of(model, 0)
        if which == "perturbed":
            break
    assert not torch.equal(model[0].weight, theta[0])
    with pytest.raises(RuntimeError, match="unfinished"):
        optimizer.passes()
    assert_same_bits(list(model.parameters()), theta)
    optimizer.step(lambda: loss_of(model, 0))
    assert list(kept) == []


def test_an_iterator_of_the_last_step_may_be_kept():
    model = network()
    optimizer = rst(model)
    kept = []
    for t in range(3):
        kept.append(optimizer.passes())
        for _ in kept[-1]:
            loss_of(model, t)
        optimizer.step()
    assert optimizer.steps == 3


def test_passes_without_step_between_are_refused():
    """The gradient is still there after the refusal, and `step` takes it."""
    model, other = network(), network()
    optimizers = rst(model), rst(other)
    for m, o in zip((model, other), optimizers, strict=True):
        torch.manual_seed(5)
        o.gradient(lambda m=m: loss_of(m, 0))
    with pytest.raises(RuntimeError, match=r"before step\(\).*micro-batches.*zero_grad"):
        optimizers[0].gradient(lambda: loss_of(model, 1))
    assert optimizers[0].steps == 1
    for o in optimizers:
        o.step()
    assert_same_bits(state(model), state(other))


def test_a_step_that_is_left_out():
    """Its gradients are dropped by any zero_grad(); it counts, as its propagations were made."""
    for drop in (
        lambda o, m: o.zero_grad(),
        lambda o, m: m.zero_grad(),
        lambda o, m: m.zero_grad(set_to_none=False),
    ):
        model = network()
        optimizer = rst(model)
        optimizer.gradient(lambda model=model: loss_of(model, 0))
        drop(optimizer, model)
        if all(p.grad is None for p in model.parameters()):
            with pytest.raises(RuntimeError, match="no gradient"):
                optimizer.step()
        optimizer.step(lambda model=model: loss_of(model, 1))
        assert optimizer.steps == 2


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_gradients_of_another_backward_are_refused(p):
    """By the pass that would drop them and by the step that would take them; they stay."""
    model = network(plain=True)
    optimizer = rst(model, p)
    loss_of(model, 0)
    before, grads = state(model), [q.grad.clone() for q in model.parameters()]
    for attempt in (
        lambda: optimizer.gradient(lambda: loss_of(model, 1)),
        lambda: optimizer.step(lambda: loss_of(model, 1)),
        lambda: next(optimizer.passes()),
        optimizer.step,
    ):
        with pytest.raises(RuntimeError, match=r"backward\(\).*passes\(\)"):
            attempt()
    assert_same_bits(state(model), before)
    assert_same_bits([q.grad for q in model.parameters()], grads)
    assert optimizer.steps == 0
    optimizer.zero_grad()
    optimizer.step(lambda: loss_of(model, 0))


def test_a_graph_kept_from_the_clean_pass_is_noticed():
    """Its backward pass would give the gradient at θ again."""
    model = network(plain=True)
    before = state(model)
    optimizer = rst(model)
    loss = F.cross_entropy(model(batches()[0][0]), batches()[1][0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.gradient(lambda: loss.backward(retain_graph=True))
    assert_same_bits(state(model), before)


def test_gradients_that_a_step_has_used_do_not_hinder_a_conversion():
    """Where `Module.to` exchanges tensors, which nothing may refer to weakly."""
    model = network(plain=True)
    optimizer = rst(model)
    optimizer.step(lambda: loss_of(model, 0))
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
    optimizer.zero_grad()  # they are other tensors now
    optimizer.step(lambda: loss_of(model, 1))


def test_gradients_that_are_zero_are_not_refused():
    """As `zero_grad(set_to_none=False)` leaves them."""
    model, other = network(), network()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for m in model, other:
        torch.manual_seed(5)
        rst(m, gamma=0.5).step(lambda m=m: loss_of(m, 0))
    assert_same_bits(state(model), state(other))
