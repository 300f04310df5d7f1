"""What RST is built around: schedules as numbers, optimizers it takes or refuses, several at once."""

import pytest
import pytorch_optimizer
import reference
import timm.optim
import torch
from reference import (
    BASES,
    WAYS,
    adamw,
    assert_close,
    assert_same_bits,
    loss_of,
    network,
    sgd,
    state,
    take_steps,
)
from torch import nn

from rst import RST, Constant, Linear, uniform

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


def test_a_number_is_a_constant():
    models = []
    for p in 0.4, Constant(0.4):
        models.append(network())
        torch.manual_seed(5)
        optimizer = RST(sgd(models[-1].parameters()), p, 20, gamma="matched", module=models[-1])
        assert optimizer.gamma == pytest.approx(2.5)
        take_steps(models[-1], optimizer, 20)
    assert_same_bits(*map(state, models))


def weights():
    return [nn.Parameter(torch.ones(3, 3))]


REFUSED = {
    "a name as schedule": (lambda: RST(sgd(weights()), "linear", 10), TypeError, "schedule.*Linear"),
    "no schedule": (lambda: RST(sgd(weights()), None, 10), TypeError, "schedule.*Linear"),
    "LBFGS": (lambda: RST(torch.optim.LBFGS(weights()), 0.5, 10), TypeError, "LBFGS.*closure.*SGD"),
    "Lookahead": (lambda: RST(timm.optim.Lookahead(sgd(weights())), 0.5, 10), TypeError, "Lookahead.*inner"),
    "RST in RST": (lambda: RST(RST(sgd(weights()), 0.5, 10), 0.5, 10), TypeError, "RST wraps an optimizer"),
    "parameters": (lambda: RST(weights(), 0.5, 10), TypeError, "torch.optim.Optimizer"),
    "a class": (lambda: RST(torch.optim.SGD, 0.5, 10), TypeError, "torch.optim.Optimizer"),
    "no optimizer": (lambda: RST([], 0.5, 10), ValueError, "needs a base"),
    "a parameter in two": (
        lambda: (lambda p: RST([sgd(p), adamw(p)], 0.5, 10))(weights()),
        ValueError,
        "two of the bases",
    ),
    "a base that maximizes": (
        lambda: RST(torch.optim.SGD(weights(), lr=0.1, maximize=True), 0.5, 10),
        ValueError,
        "negate the loss",
    ),
    "a list of models": (
        lambda: RST(sgd(weights()), 0.5, 10, module=[nn.Linear(1, 1)]),
        TypeError,
        "ModuleList",
    ),
    "a sparse embedding": (
        lambda: (lambda m: RST(sgd(m.parameters()), 0.5, 10, module=m))(nn.Embedding(3, 2, sparse=True)),
        ValueError,
        "sparse=False",
    ),
}


def test_a_module_that_is_refused_is_refused_when_it_is_set_later():
    class FullyShardedDataParallel(nn.Linear):
        """FSDP1, by its name."""

    optimizer = RST(sgd(weights()), 0.5, 10)
    with pytest.raises(ValueError, match="fully_shard"):
        optimizer.module = FullyShardedDataParallel(1, 1)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make()


def test_a_module_that_is_called_sparse_is_not_an_embedding():
    layer = nn.Linear(2, 2)
    layer.sparse = True
    RST(sgd(layer.parameters()), 0.5, 10, module=layer)


def test_lookahead_goes_around():
    """It averages the weights of which it finds a gradient after the step. Against the twin in the same."""
    model, twin = network(), network()
    optimizer = RST(sgd(model.parameters()), 0.5, 20, module=model)
    around, around_twin = (
        timm.optim.Lookahead(optimizer, k=3),
        timm.optim.Lookahead(sgd(twin.parameters()), k=3),
    )
    params = list(twin.parameters())
    torch.manual_seed(5)
    for t in range(10):
        for _ in optimizer.passes():
            loss_of(model, t)
        around.step()
    for t in range(10, 20):
        around.step(lambda t=t: loss_of(model, t))
    torch.manual_seed(5)
    for t in range(20):
        sam = uniform(0, t) < 0.5
        reference.gradient(twin, params, lambda t=t: loss_of(twin, t), sam=sam, rho=[0.1] * len(params))
        around_twin.step()
    assert all("lookahead_slow_buff" in optimizer.state[p] for p in model.parameters())
    assert 0 < optimizer.sam_steps < 20
    assert_close(state(model), state(twin))


def test_sparse_gradients_are_refused_at_the_first_step():
    """Without `module`, nothing told that they come."""
    model = nn.Embedding(3, 2, sparse=True)
    start = model.weight.detach().clone()
    optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, 10)
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step(lambda: model(torch.tensor([0, 1])).sum().backward())
    assert torch.equal(model.weight, start)
    assert model.weight.grad is None


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_rho_that_is_the_base_s_own(adaptive):
    """Adadelta's ρ is a decay rate. ‖ε‖, or ‖ε/|θ|‖, is RST's."""
    model = network(plain=True)
    base = torch.optim.Adadelta(model.parameters(), rho=0.9)
    optimizer = RST(base, 1.0, 10, rho=0.1, adaptive=adaptive)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in model.parameters()])
        return loss_of(model, 0)

    optimizer.gradient(closure)
    theta, perturbed = seen
    epsilon = [p - t for p, t in zip(perturbed, theta, strict=True)]
    if adaptive:
        epsilon = [e / t.abs() for e, t in zip(epsilon, theta, strict=True)]
    assert reference.norm(epsilon).item() == pytest.approx(0.1, rel=1e-12)
    assert base.param_groups[0]["rho"] == 0.9
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert base.param_groups[1]["rho"] == 0.9


class Complex(nn.Module):
    """A real loss of complex and real weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.spectrum = nn.Parameter(torch.randn(4, 6, dtype=torch.complex128))
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head((torch.fft.fft(x) @ self.spectrum.T).abs())


@GAMMAS
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_complex_weights(adaptive, gamma):
    model, twin = Complex(), Complex()
    rule = {"rho": 0.3, "gamma": gamma, "adaptive": adaptive}
    X = reference.train(
        twin, adamw(twin.parameters()), lambda t: loss_of(twin, t), lambda t, T: 0.5, 20, **rule
    )
    assert take_steps(model, RST(adamw(model.parameters()), 0.5, 20, module=model, **rule), 20) == X
    assert_close(state(model), state(twin))


class Both:
    """Several optimizers for `reference.train`, which wants groups and a step."""

    def __init__(self, bases):
        self.bases = bases
        self.param_groups = [group for base in bases for group in base.param_groups]

    def step(self):
        for base in self.bases:
            base.step()


def muon_and_adamw(model):
    """Muon takes weights of two dimensions alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.01), adamw(others)]


@pytest.mark.parametrize("way", WAYS)
@GAMMAS
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_several_bases_have_one_perturbation(adaptive, gamma, way):
    """The tolerance is for Muon, which orthogonalizes in bfloat16, where a rounding is 2^-9 of a step."""
    model, twin = network(), network()
    rule = {"gamma": gamma, "adaptive": adaptive}
    torch.manual_seed(5)
    expected = reference.train(
        twin, Both(muon_and_adamw(twin)), lambda t: loss_of(twin, t), lambda t, T: 0.5, 20, rho=0.5, **rule
    )
    torch.manual_seed(5)
    optimizer = RST(muon_and_adamw(model), 0.5, 20, rho=0.5, module=model, **rule)
    assert take_steps(model, optimizer, 20, way=WAYS[way]) == expected
    assert_close(state(model), state(twin), rtol=1e-4, atol=1e-4)


def test_several_bases_are_one_optimizer():
    """Groups and state are the bases', for reading and writing; a scheduler drives all."""
    model = network()
    optimizer = RST(muon_and_adamw(model), 0.5, 20, module=model)
    muon, second = optimizer.bases
    assert optimizer.param_groups == muon.param_groups + second.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    take_steps(model, optimizer, 2)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]

    matrix, bias = model[0].weight, model[4].bias
    assert optimizer.state[matrix] is muon.state[matrix] and "momentum_buffer" in muon.state[matrix]
    assert optimizer.state[bias] is second.state[bias] and "exp_avg" in second.state[bias]
    assert set(optimizer.state) == set(model.parameters()) and len(optimizer.state) == len(muon.state) + len(
        second.state
    )
    for p, values in optimizer.state.items():  # as frameworks move it to a device
        optimizer.state[p] = {key: value.clone() for key, value in values.items()}
    assert bias not in muon.state and matrix not in second.state
    del optimizer.state[bias]
    assert bias not in second.state and bias not in optimizer.state

    group = {"params": [nn.Parameter(torch.zeros(1, dtype=torch.float64))]}
    with pytest.raises(AttributeError, match=r"\.bases"):
        optimizer.add_param_group(group)
    second.add_param_group(group)
    assert optimizer.param_groups[-1] is second.param_groups[-1]


@pytest.mark.parametrize("zeroed", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_closure_that_zeroes_the_gradients_of_one_base(gamma, zeroed):
    models = network(), network()
    optimizers = [RST(muon_and_adamw(m), 1.0, 5, gamma=gamma, module=m) for m in models]

    def closure(t):
        optimizers[0].bases[zeroed].zero_grad()
        return loss_of(models[0], t)

    torch.manual_seed(5)
    for t in range(5):
        optimizers[0].step(lambda t=t: closure(t))
    torch.manual_seed(5)
    take_steps(models[1], optimizers[1], 5)
    assert_close(*map(state, models), rtol=1e-4, atol=1e-4)


@GAMMAS
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_another_optimizer_on_the_same_model(p, gamma):
    """Its parameters are left the clean pass's gradients, and not perturbed, stepped or zeroed."""
    model, clean = network(), network()
    optimizer = RST(sgd(model[0].parameters()), p, 5, gamma=gamma, rho=1.0, module=model)
    others = [q for q in model.parameters() if q is not model[0].weight]
    other = adamw(others)
    seen = []
    for t in range(3):
        clean.load_state_dict(model.state_dict())
        clean.zero_grad()
        torch.manual_seed(t)
        loss_of(clean, t)
        expected = [q.grad for name, q in clean.named_parameters() if name != "0.weight"]

        def closure(t=t):
            seen.append([q.detach().clone() for q in others])
            return loss_of(model, t)

        torch.manual_seed(t)
        optimizer.gradient(closure)
        assert_same_bits([q.grad for q in others], expected)
        assert_same_bits(seen[-1], others)
        optimizer.step()
        assert_same_bits([q.grad for q in others], expected)
        other.step()
        other.zero_grad()


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_network_that_the_body_unfreezes_has_the_gradient_of_the_clean_pass(gamma):
    model, critic, grads = network(plain=True), nn.Linear(4, 1).double(), []
    both = nn.ModuleList([model, critic])
    optimizer = RST(sgd(model.parameters()), 1.0, 10, gamma=gamma, module=both)
    critic.requires_grad_(False)
    for _ in optimizer.passes():
        critic.requires_grad_(True)
        critic(loss_of(model, 0).detach().expand(1, 4)).sum().backward()
        grads.append(critic.weight.grad.clone())
    assert_same_bits([critic.weight.grad], grads[:1])
    assert not torch.equal(*grads)


def test_a_base_whose_zero_grad_takes_no_argument():
    class Own(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad()

    model = network()
    optimizer = RST(Own(model.parameters(), lr=0.1), 1.0, 10)
    optimizer.step(lambda: loss_of(model, 0))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_train_and_eval_reach_a_schedule_free_base():
    """Its weights in evaluation are an average."""
    models, optimizers = [network(), network()], []
    for model in models:
        optimizers.append(pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=0.01))
    optimizers[0] = RST(optimizers[0], 0.0, 5, module=models[0])
    for optimizer in optimizers:
        optimizer.train()
    torch.manual_seed(5)
    take_steps(models[0], optimizers[0], 5)
    torch.manual_seed(5)
    for t in range(5):
        optimizers[1].zero_grad()
        loss_of(models[1], t)
        optimizers[1].step()
    training = state(models[0])
    assert_same_bits(training, state(models[1]))
    for optimizer in optimizers:
        optimizer.eval()
    assert_same_bits(*map(state, models))
    assert not torch.equal(models[0][0].weight, training[0])
    optimizers[0].train()
    assert_close(state(models[0]), training)


@pytest.mark.parametrize("base", BASES)
def test_train_and_eval_of_other_bases_do_nothing(base):
    model = network()
    optimizer = RST(BASES[base](model.parameters()), Linear(0.0, 1.0), 5, module=model)
    optimizer.eval()
    optimizer.train()
    assert model.training
