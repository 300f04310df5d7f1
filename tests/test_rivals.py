"""The rivals: each against a twin that keeps all its vectors, in its limits, resumed, scaled and misused."""

import copy
import inspect
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import pytorch_optimizer
import reference
import torch
import torch.nn.functional as F
from reference import (
    BASES,
    WAYS,
    adamw,
    assert_close,
    assert_same_bits,
    batches,
    by_passes,
    loss_of,
    network,
    sgd,
    state,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from rst import (
    AESAM,
    RST,
    VSAM,
    LookSAM,
    MomentumSAM,
    PartialAscent,
    Periodic,
    StaleAscent,
    uniform,
)

T, RHO, SEED = 20, 0.3, 3
COIN = {"total_steps": T, "rho": RHO, "seed": SEED}
RIVALS = {
    "looksam": lambda base, **o: LookSAM(base, schedule=Periodic(3), total_steps=T, rho=RHO, alpha=0.7, **o),
    "rst-look": lambda base, **o: LookSAM(base, schedule=0.4, alpha=0.7, **COIN, **o),
    "vsam": lambda base, **o: VSAM(base, schedule=0.4, **COIN, **o),
    "aesam": lambda base, **o: AESAM(base, total_steps=T, rho=RHO, **o),
    "aelooksam": lambda base, **o: AESAM(base, total_steps=T, rho=RHO, reuse=True, alpha=0.7, **o),
    "msam": lambda base, **o: MomentumSAM(base, total_steps=T, rho=RHO, **o),
    "stale": lambda base, **o: StaleAscent(base, total_steps=T, rho=RHO, **o),
    "partial": lambda base, **o: PartialAscent(base, schedule=0.6, fraction=0.5, **COIN, **o),
}
every_rival = pytest.mark.parametrize("name", RIVALS)


def body(model, optimizer, t, dtype=torch.float64):
    """Forward and backward on the part of step t's batch that the optimizer asks for."""
    x, y = (tensor[t] for tensor in batches(dtype))
    n = optimizer.images(len(x))
    loss = F.cross_entropy(model(x[:n]), y[:n])
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps, start=0, way=by_passes):
    for t in range(start, start + steps):
        way(optimizer, lambda t=t: body(model, optimizer, t))


class Step:
    """Step t of a twin. Called with ε, it gives the gradient at θ + ε as one vector: with the same noise in
    all calls, and buffers that move in the first. `cost` counts propagations."""

    def __init__(self, model, t):
        self.model, self.t, self.cost = model, t, 0
        self.noise = torch.get_rng_state()

    def __call__(self, epsilon=0.0, part=1.0):
        params = list(self.model.parameters())
        x, y = (tensor[self.t] for tensor in batches())
        theta, buffers = state(self.model)[: len(params)], [b.clone() for b in self.model.buffers()]
        vector = nn.utils.parameters_to_vector(params).detach() + epsilon
        nn.utils.vector_to_parameters(vector, params)
        torch.set_rng_state(self.noise)
        n = round(part * len(x))
        _, g = reference.evaluate(params, lambda: backward(F.cross_entropy(self.model(x[:n]), y[:n])))
        reference.assign(params, theta)
        if self.cost:
            reference.assign(list(self.model.buffers()), buffers)
        else:
            self.after = torch.get_rng_state()
        torch.set_rng_state(self.after)
        self.cost += part
        return torch.cat([x.flatten() for x in g])


def backward(loss):
    loss.backward()
    return loss


def unit(vector):
    return vector / vector.norm() if vector.norm() > 0 else vector


def look(at, sam, m, alpha=0.7):
    g = at()
    if sam:
        g_s = at(RHO * unit(g))
        m.v = g_s - (g_s @ g) / (g @ g) * g
        return g_s
    return g + alpha * g.norm() * unit(m.v) if hasattr(m, "v") else g


def vsam(at, sam, m):
    g = at()
    if sam:
        g_s = at(RHO * unit(g))
        m.d = g_s - g
        return g_s
    return g + getattr(m, "d", 0.0)


def aesam(at, m, reuse):
    g = at()
    squared = g @ g
    m.mu = 0.9 * getattr(m, "mu", 0.0) + 0.1 * squared
    m.var = 0.9 * getattr(m, "var", 0.0) + 0.1 * (squared - m.mu) ** 2
    c = -1.0 * at.t / T + 1.0 * (1 - at.t / T)
    sam = bool(squared >= m.mu + c * m.var.sqrt())
    m.X.append(sam)
    if sam:
        g_s = at(RHO * unit(g))
        m.v = g_s - (g_s @ g) / (g @ g) * g
        return g_s
    return g + 0.7 * g.norm() * unit(m.v) if reuse and hasattr(m, "v") else g


def msam(at, m):
    """Its own momentum buffer, that of `reference.sgd`."""
    theta = nn.utils.parameters_to_vector(at.model.parameters()).detach()
    v = getattr(m, "v", torch.zeros_like(theta))
    g = at(-RHO * unit(v))
    m.v = 0.9 * v + g + 1e-3 * theta
    return g


def stale(at, m):
    m.g = at(RHO * unit(m.g) if hasattr(m, "g") else 0.0)
    return m.g


def partial(at, sam):
    return at(RHO * unit(at(part=0.5))) if sam else at()


def coin(at, p):
    return uniform(SEED, at.t) < p


TWINS = {
    "looksam": lambda at, m: look(at, at.t % 3 == 0, m),
    "rst-look": lambda at, m: look(at, coin(at, 0.4), m),
    "vsam": lambda at, m: vsam(at, coin(at, 0.4), m),
    "aesam": lambda at, m: aesam(at, m, reuse=False),
    "aelooksam": lambda at, m: aesam(at, m, reuse=True),
    "msam": msam,
    "stale": stale,
    "partial": lambda at, m: partial(at, coin(at, 0.6)),
}


def train_twin(model, base, rule, steps=T):
    """Returns the propagations."""
    memory, cost = SimpleNamespace(X=[]), 0
    for t in range(steps):
        at = Step(model, t)
        g = rule(at, memory)
        cost += at.cost
        sizes = [p.numel() for p in model.parameters()]
        for p, part in zip(model.parameters(), g.split(sizes), strict=True):
            p.grad = part.view_as(p).clone()
        base.step()
    assert not memory.X or 0 < sum(memory.X) < steps  # AE-SAM takes steps of both kinds
    return cost


@pytest.mark.parametrize("way", WAYS)
@every_rival
def test_twin(name, way):
    """With BatchNorm and dropout; by `passes()`, `gradient(closure)` and `step(closure)`."""
    model, twin = network(), network()
    optimizer = RIVALS[name](sgd(model.parameters()), module=model)
    torch.manual_seed(5)
    train(model, optimizer, T, way=WAYS[way])
    torch.manual_seed(5)
    cost = train_twin(twin, sgd(twin.parameters()), TWINS[name])
    assert_close(state(model), state(twin))
    assert optimizer.propagations == pytest.approx(cost, rel=1e-12)
    assert cost == T if name in ("msam", "stale") else T < cost < 2 * T
    assert optimizer.sam_steps == (
        0 if name in ("msam", "stale") else round((cost - T) / (0.5 if name == "partial" else 1))
    )


@every_rival
def test_the_options_of_rst_reach_the_rule(name):
    options = {"adaptive": True, "sampling": "systematic", "sync_perturbation": True}
    known = inspect.signature(type(RIVALS[name](sgd(network().parameters())))).parameters
    taken = {option: value for option, value in options.items() if option in known}
    rule = RIVALS[name](sgd(network().parameters()), **taken)
    assert {option: getattr(rule, option) for option in taken} == taken
    assert taken or name == "msam"


PLAIN = {"schedule": 0.0, "total_steps": T, "rho": RHO}
SAM = {"schedule": 1.0, "total_steps": T, "rho": RHO}
THIRD = {"schedule": Periodic(3), "total_steps": T, "rho": RHO}
OWN = {"total_steps": T, "rho": RHO}
LIMITS = {
    "LookSAM, α = 0: SAM every third step": (THIRD, LookSAM, {**THIRD, "alpha": 0.0}),
    "LookSAM, p = 1: SAM": (SAM, LookSAM, SAM),
    "VSAM, p = 1: SAM": (SAM, VSAM, SAM),
    "LookSAM, p = 0: SGD": (PLAIN, LookSAM, PLAIN),
    "AE-SAM, c = −∞: SAM": (SAM, AESAM, {**OWN, "lambda_1": -1e30, "lambda_2": -1e30, "reuse": True}),
    "AE-SAM, c = +∞: SGD": (PLAIN, AESAM, {**OWN, "lambda_1": 1e30, "lambda_2": 1e30, "reuse": True}),
    "AE-SAM, warmup: SGD": (PLAIN, AESAM, {**OWN, "warmup_steps": T}),
    "partial ascent, f = 1: SAM": (SAM, PartialAscent, {**OWN, "fraction": 1.0}),
    "Momentum-SAM, ρ = 0: SGD": (PLAIN, MomentumSAM, {**OWN, "rho": 0.0}),
    "stale ascent, ρ = 0: SGD": (PLAIN, StaleAscent, {**OWN, "rho": 0.0}),
    "stale ascent, warmup: SGD": (PLAIN, StaleAscent, {**OWN, "warmup_steps": T}),
    "systematic, p = 1: SAM": (SAM, RST, {**SAM, "sampling": "systematic"}),
    "systematic, p = 0: SGD": (PLAIN, RST, {**PLAIN, "sampling": "systematic"}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit):
    """Bit for bit, with BatchNorm and dropout, and the same number of propagations."""
    arguments, rival, options = LIMITS[limit]
    runs = []
    for make, given in (RST, arguments), (rival, options):
        model = network(torch.float32)
        optimizer = make(sgd(model.parameters()), module=model, **given)
        torch.manual_seed(5)
        train32(model, optimizer, range(T))
        runs.append((state(model), optimizer.propagations))
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_systematic_steps_are_counted_and_resumed():
    """12 SAM steps of 30 at p = 0.4, whatever the offset; a run from the middle takes the same ones."""

    def start(seed):
        model = network()
        return model, RST(sgd(model.parameters()), 0.4, 30, sampling="systematic", module=model, seed=seed)

    for seed in range(4):
        model, optimizer = start(seed)
        train(model, optimizer, 30)
        assert optimizer.sam_steps == 12 and optimizer.propagations_std == pytest.approx(0, abs=1e-6)
    model, optimizer = start(1)
    train(model, optimizer, 13)
    again, resumed = start(1)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in (model, optimizer), (again, resumed):
        torch.manual_seed(7)
        train(m, o, 17, start=13)
    assert_same_bits(state(again), state(model))
    with pytest.warns(UserWarning, match="sampled systematically"):
        RST(sgd(network().parameters()), 0.4, 30, seed=1).load_state_dict(optimizer.state_dict())


def interrupted(name, base, folder):
    """A whole run, and one that is saved after 7 of its steps and goes on in other objects."""
    model = network(torch.float32)
    optimizer = RIVALS[name](base(model.parameters()), module=model)
    torch.manual_seed(5)
    train32(model, optimizer, range(7))
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], folder / "state.pt")
    train32(model, optimizer, range(7, T))
    again = network(torch.float32)
    resumed = RIVALS[name](base(again.parameters()), module=again)
    weights, saved, noise = torch.load(folder / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    torch.set_rng_state(noise)
    train32(again, resumed, range(7, T))
    return (model, optimizer), (again, resumed)


def train32(model, optimizer, steps):
    for t in steps:
        optimizer.step(lambda t=t: body(model, optimizer, t, torch.float32))


@pytest.mark.parametrize("base", BASES)
@every_rival
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(name, base, tmp_path):
    if name == "msam" and base == "adamw":
        return
    (model, optimizer), (again, resumed) = interrupted(name, BASES[base], tmp_path)
    assert_same_bits(state(again), state(model))
    assert resumed.propagations == optimizer.propagations


@every_rival
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(name):
    """Before the first SAM step of some, too: what they carry has its place in the state from the start."""
    runs = []
    for steps in 1, 6:
        model = network(torch.float32, plain=True)
        optimizer = RIVALS[name](sgd(model.parameters()), module=model)
        train32(model, optimizer, range(steps))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        again = copy.deepcopy(model)
        resumed = RIVALS[name](sgd(again.parameters()), module=again)
        keys = get_optimizer_state_dict(again, resumed)["state"]["0.weight"].keys()
        assert keys == saved["state"]["0.weight"].keys()
        set_optimizer_state_dict(again, resumed, saved)
        for m, o in (model, optimizer), (again, resumed):
            train32(m, o, range(steps, 10))
        runs.append((state(model), state(again)))
    for straight, resumed in runs:
        assert_same_bits(straight, resumed)


@every_rival
def test_loss_scaling_cancels(name):
    """A scale that doubles with each step: powers of two leave all digits, and all decisions, as they are."""
    models = []
    for enabled in False, True:
        model = network(torch.float32)
        optimizer = RIVALS[name](sgd(model.parameters()), module=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1, enabled=enabled)
        if hasattr(optimizer, "scaler"):
            optimizer.scaler = scaler
        torch.manual_seed(5)
        for t in range(T):
            train_scaled(model, optimizer, scaler, t)
        assert not enabled or scaler.get_scale() == 2.0 ** (T + 1)
        models.append((state(model), optimizer.propagations))
    assert_same_bits(models[0][0], models[1][0])
    assert models[0][1] == models[1][1]


def train_scaled(model, optimizer, scaler, t, autocast=False, spoil=False):
    x, y = (tensor[t] for tensor in batches(torch.float32))
    for which in optimizer.passes():
        n = optimizer.images(len(x))
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = F.cross_entropy(model(x[:n]), y[:n])
        scaler.scale(loss).backward()
        if spoil in (True, which):
            model[0].weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss


@every_rival
def test_a_skipped_step_leaves_what_is_carried(name):
    """As it counts and does nothing else: the run is one in which its batch was never there."""
    model = network(torch.float32)
    optimizer = RIVALS[name](sgd(model.parameters()), module=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if hasattr(optimizer, "scaler"):
        optimizer.scaler = scaler
    for t in range(6):
        train_scaled(model, optimizer, scaler, t, autocast=True)
    before = copy.deepcopy([dict(optimizer.state[p]) for p in model.parameters()])
    moments = getattr(optimizer, "mean", None), getattr(optimizer, "variance", None)
    weights = [p.detach().clone() for p in model.parameters()]
    train_scaled(model, optimizer, scaler, 6, autocast=True, spoil=True)  # in LookSAM a SAM step
    after = [dict(optimizer.state[p]) for p in model.parameters()]
    assert optimizer.steps == 7 and scaler.get_scale() == 2.0**9
    assert_same_bits(list(model.parameters()), weights)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert moments == (getattr(optimizer, "mean", None), getattr(optimizer, "variance", None))
    losses = [train_scaled(model, optimizer, scaler, t, autocast=True) for t in range(7, T)]
    assert all(loss.isfinite() for loss in losses) and optimizer.steps == T


def test_an_overflow_in_the_second_pass_leaves_the_averages_of_ae_sam():
    model = network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sgd_ = sgd(model.parameters())
    optimizer = AESAM(sgd_, total_steps=T, lambda_1=-1e30, lambda_2=-1e30, module=model, scaler=scaler)
    train_scaled(model, optimizer, scaler, 0)
    before = optimizer.mean, optimizer.variance
    train_scaled(model, optimizer, scaler, 1, spoil="perturbed")
    assert (optimizer.mean, optimizer.variance) == before != (0, 0)
    train_scaled(model, optimizer, scaler, 2)
    assert (optimizer.mean, optimizer.variance) != before


@every_rival
def test_zero_grad_in_the_body_changes_nothing(name):
    states = []
    for zero in (False, True):
        model = network(plain=True)
        optimizer = RIVALS[name](sgd(model.parameters()), module=model)
        for t in range(T):
            for _ in optimizer.passes():
                if zero:
                    optimizer.zero_grad()
                body(model, optimizer, t)
            optimizer.step()
        states.append((state(model), optimizer.propagations, getattr(optimizer, "mean", None)))
    assert_same_bits(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


@every_rival
def test_a_hook_on_steps_runs_once_a_step(name):
    model = network(plain=True)
    RST(sgd(network().parameters()), 0.5, T)  # PyTorch puts hooks into the `step` of every class that is made
    optimizer, calls = RIVALS[name](sgd(model.parameters()), module=model), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, 2)
    assert len(calls) == 2


ALWAYS = {
    "looksam": lambda base: LookSAM(base, schedule=1.0, total_steps=T),
    "vsam": lambda base: VSAM(base, schedule=1.0, total_steps=T),
    "aelooksam": lambda base: AESAM(base, total_steps=T, lambda_1=-1e30, lambda_2=-1e30, reuse=True),
    "partial": lambda base: PartialAscent(base, total_steps=T),
    "msam": lambda base: MomentumSAM(base, total_steps=T),
    "stale": lambda base: StaleAscent(base, total_steps=T),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_a_step_that_ends_early_leaves_nothing_behind(name):
    """In its first pass or in its last."""
    runs = []
    for attempts in (), (1, 2):
        model = network(plain=True)
        optimizer = ALWAYS[name](sgd(model.parameters()))
        train(model, optimizer, 3)
        for last in attempts if name not in ("msam", "stale") else attempts[:1]:
            for i, _ in enumerate(optimizer.passes(), start=1):
                body(model, optimizer, 9)
                if i == last:
                    break
            assert optimizer.steps == 3 and optimizer.images(8) == 8
        train(model, optimizer, 3, start=3)
        moments = [getattr(optimizer, key, None) for key in ("mean", "variance", "propagations")]
        runs.append((state(model), moments))
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("whole", [False, True], ids=["asking", "not asking"])
def test_partial_ascent_counts_what_the_loop_asked_for(whole):
    """3 of 8 images at f = 0.4, also by micro-batches; all of them where the loop does not ask."""
    model = network()
    optimizer = PartialAscent(sgd(model.parameters()), total_steps=2, fraction=0.4, module=model)
    seen = []
    for which in optimizer.passes():
        sizes = [8] if whole else [optimizer.images(4), optimizer.images(4)]
        seen.append((which, sizes))
        loss_of(model, 0)
    optimizer.step()
    assert seen == (
        [("clean", [8]), ("perturbed", [8])] if whole else [("clean", [2, 2]), ("perturbed", [4, 4])]
    )
    assert optimizer.propagations == (2 if whole else 1.5)
    assert optimizer.expected_propagations == pytest.approx(2.8)
    assert optimizer.images(8) == 8
    next(iter(passes := optimizer.passes()))
    assert optimizer.images(8) == 3
    passes.close()
    assert optimizer.images(8) == 8


def test_the_state_of_another_method_is_not_misread():
    """LookSAM's vector is not vSAM's, whose plain step is one of SGD then; AE-SAM begins its averages."""
    model = network(plain=True)
    looksam = RIVALS["looksam"](sgd(model.parameters()), module=model)
    train(model, looksam, 3)
    vsam = VSAM(sgd(model.parameters()), schedule=Periodic(3), total_steps=T, rho=RHO)
    aesam = RIVALS["aesam"](sgd(model.parameters()), module=model)
    with warnings.catch_warnings(action="ignore"):  # of another schedule
        for other in vsam, aesam:
            other.load_state_dict(looksam.state_dict())
    looksam.zero_grad()
    vsam.steps = 4
    for _ in vsam.passes():
        body(model, vsam, 4)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    body(model, vsam, 4)
    assert_same_bits(found, [p.grad for p in model.parameters()])
    assert (aesam.mean, aesam.variance, aesam.steps) == (0, 0, 3)


def test_expected_propagations():
    def expected(name):
        optimizer = RIVALS[name](sgd(network().parameters()))
        return optimizer.expected_propagations, optimizer.propagations_std

    assert expected("looksam") == (27, 0)
    assert expected("rst-look") == expected("vsam") == pytest.approx((28, math.sqrt(T * 0.24)))
    assert expected("aesam") == expected("aelooksam") == (None, None)  # only the run can tell
    assert expected("msam") == expected("stale") == (T, 0)
    assert expected("partial") == pytest.approx((26, 0.5 * math.sqrt(T * 0.24)))


def test_momentum_sam_with_several_bases():
    """ε is along the momentum of those that have one; the others' weights stay where they are."""
    model = network(plain=True)
    bases = [sgd(model[0].parameters()), adamw(model[2].parameters())]
    optimizer = MomentumSAM(bases, total_steps=T, rho=RHO, module=model)
    train(model, optimizer, 2)
    theta = [p.detach().clone() for p in model.parameters()]
    v = [optimizer.state[p]["momentum_buffer"].clone() for p in model[0].parameters()]
    for which in optimizer.passes():
        assert which == "perturbed"
        length = reference.norm(v)
        for p, q, x in zip(model[0].parameters(), theta, v, strict=False):
            torch.testing.assert_close(p.detach(), q - RHO * x / length)
        assert_same_bits(list(model[2].parameters()), theta[2:])
        body(model, optimizer, 2)
    assert_same_bits(list(model.parameters()), theta)


def test_looksam_agrees_with_pytorch_optimizer_on_a_single_tensor():
    """On more it differs: theirs takes norms and products tensor by tensor. It also adds 1e-12 and 1e-8 to
    norms, and calls the closure again in plain steps."""
    ours, theirs = (nn.Linear(6, 3, bias=False).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.05, "momentum": 0.9}
    base = torch.optim.SGD(ours.parameters(), **settings)
    optimizer = LookSAM(base, schedule=Periodic(3), total_steps=T, rho=RHO, alpha=0.7)
    rule = {"rho": RHO, "k": 3, "alpha": 0.7}
    look = pytorch_optimizer.LookSAM(theirs.parameters(), torch.optim.SGD, **rule, **settings)

    def closure(t):
        look.zero_grad()
        return loss_of(theirs, t)

    for t in range(T):
        optimizer.step(lambda t=t: loss_of(ours, t))
        closure(t)
        look.step(lambda t=t: closure(t))
    assert optimizer.propagations == 27
    assert_close(state(ours), state(theirs), rtol=1e-6, atol=1e-7)


def test_momentum_sam_notices_that_its_base_keeps_no_buffer():
    model = network()
    base = torch.optim.Adagrad(model.parameters())
    base.param_groups[0]["momentum"] = 0.9  # as that of an optimizer which keeps it under another name
    with pytest.raises(RuntimeError, match="no momentum_buffer"):
        train(model, MomentumSAM(base, total_steps=T), 1)


def parameters():
    return [nn.Parameter(torch.ones(3))]


def weights():
    return sgd(parameters())


ERRORS = {
    "alpha": (
        lambda: LookSAM(weights(), schedule=0.5, total_steps=T, alpha=-0.1),
        "alpha must be a finite number of at least 0, got -0.1",
    ),
    "fraction of 0": (
        lambda: PartialAscent(weights(), total_steps=T, fraction=0),
        "fraction must be above 0 and at most 1, got 0",
    ),
    "fraction above 1": (lambda: PartialAscent(weights(), total_steps=T, fraction=1.5), "got 1.5"),
    "delta": (lambda: AESAM(weights(), total_steps=T, delta=1.0), "delta must be in [0, 1), got 1.0"),
    "lambda": (
        lambda: AESAM(weights(), total_steps=T, lambda_1=math.nan),
        "lambda_1 must be a finite number, got nan",
    ),
    "a schedule for AE-SAM": (
        lambda: AESAM(weights(), schedule=Periodic(5), total_steps=T),
        "AESAM does not go by a schedule: leave it out",
    ),
    "a schedule for Momentum-SAM": (
        lambda: MomentumSAM(weights(), schedule=0.5, total_steps=T),
        "MomentumSAM does not go by a schedule",
    ),
    "no momentum": (
        lambda: MomentumSAM(adamw(parameters()), total_steps=T),
        "AdamW has none: use SGD(momentum=0.9)",
    ),
    "momentum of 0": (
        lambda: MomentumSAM(torch.optim.SGD(parameters()), total_steps=T),
        "SGD has none: use SGD(momentum=0.9)",
    ),
    "rho": (
        lambda: StaleAscent(weights(), total_steps=T, rho=-1),
        "rho must be a finite number of at least 0, got -1",
    ),
    "sampling": (
        lambda: LookSAM(weights(), schedule=0.5, total_steps=T, sampling="even"),
        "'independent' or 'systematic', got 'even'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_get_a_line_that_says_what_to_do(case):
    make, words = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make()
    assert "\n" not in str(caught.value)
