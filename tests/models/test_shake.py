"""Shake-Shake and ShakeDrop: factors, gradients, and what each pass of a SAM step sees of them.

Statistical tests have a fixed seed; the bounds are such that another seed would fail one run in a million.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rst import RST, Constant
from rst.models.shake import ShakeDrop, ShakeShake, decoupled
from rst.passes import true_gradient

RARE = 1e-6
SIGMAS = stats.norm.isf(RARE / 2)
MAKE: dict[str, Callable[[], nn.Module]] = {
    "ShakeDrop, kept": lambda: ShakeDrop(1.0),
    "ShakeDrop, dropped": lambda: ShakeDrop(0.0),
    "ShakeDrop, one gate": lambda: ShakeDrop(0.0, gate="batch"),
    "ShakeShake": ShakeShake,
}


def inputs_of(shake: nn.Module) -> int:
    return 2 if isinstance(shake, ShakeShake) else 1


def factors(shake: nn.Module, n: int = 1) -> tuple[Tensor, Tensor]:
    """What the first input is multiplied by, forward and backward: n each, in double precision."""
    x = torch.ones(n, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    y = shake(x, *[torch.zeros_like(x)] * (inputs_of(shake) - 1))
    y.sum().backward()
    return y.detach().flatten(), x.grad.flatten()


def drawn(make: Callable[[], nn.Module], passes: int, n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shake = make()
    forward, backward = zip(*(factors(shake, n) for _ in range(passes)), strict=True)
    return torch.cat(forward), torch.cat(backward)


def test_decoupled_is_the_product_and_its_gradient_the_one_asked_for() -> None:
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    forward, backward = torch.rand(2, 5, 1, 1, 1, dtype=torch.float64)
    for true, factor in ((False, backward), (True, forward)):
        y = decoupled(x, forward, backward, true)
        assert torch.equal(y, x * forward)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(gradient, upstream * factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_any_precision_keeps_its_type_and_the_draws(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    shake = make()
    outputs, states = [], []
    for x in (torch.ones(8, 1, 2, 2), torch.ones(8, 1, 2, 2, dtype=dtype)):
        torch.manual_seed(1)
        outputs.append(shake(*(s * x for s in (1, -1)[: inputs_of(shake)])))
        states.append(torch.get_rng_state())
        assert outputs[-1].dtype == x.dtype
    # Three roundings of numbers of at most 1 each.
    assert torch.allclose(outputs[0], outputs[1].float(), rtol=0, atol=2 * max(torch.finfo(dtype).eps, 1e-7))
    assert torch.equal(*states)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_without_data(make: Callable[[], nn.Module]) -> None:
    shake = make()
    x = torch.ones(8, 3, 2, 2, device="meta", requires_grad=True)
    y = shake(*[x] * inputs_of(shake))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_one_factor_for_each_image(make: Callable[[], nn.Module]) -> None:
    shake = make()
    y = shake(*(s * torch.ones(6, 3, 4, 4) for s in (1, 0)[: inputs_of(shake)]))
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    assert len(y[:, 0, 0, 0].unique()) == (1 if getattr(shake, "keep", 0) == 1 else 6)


@pytest.mark.parametrize(
    ("make", "low"), [(lambda: ShakeDrop(0.0), -1), (ShakeShake, 0)], ids=["ShakeDrop, dropped", "ShakeShake"]
)
def test_distribution_of_the_factors(make: Callable[[], nn.Module], low: float) -> None:
    """a ~ U(low, 1) and β ~ U(0, 1), independent: Kolmogorov-Smirnov, and the correlation."""
    a, beta = drawn(make, passes=1, n=20_000)
    assert stats.kstest(a, stats.uniform(low, 1 - low).cdf).pvalue > RARE
    assert stats.kstest(beta, stats.uniform(0, 1).cdf).pvalue > RARE
    assert stats.pearsonr(a, beta).pvalue > RARE


def test_shakedrop_keeps_or_drops_each_image() -> None:
    """Binomial for each image, and pairs of images of one pass independent: the numbers kept are χ²."""
    torch.manual_seed(0)
    passes = [factors(ShakeDrop(0.8), 4) for _ in range(2000)]
    kept = torch.stack([forward == 1 for forward, _ in passes])
    assert torch.equal(kept, torch.stack([backward == 1 for _, backward in passes]))
    for image in range(4):
        assert stats.binomtest(int(kept[:, image].sum()), 2000, 0.8).pvalue > RARE
    counts = kept.sum(1).bincount(minlength=5)
    assert stats.chisquare(counts, 2000 * stats.binom(4, 0.8).pmf(range(5))).pvalue > RARE


def test_shakedrop_with_one_gate_keeps_the_whole_batch_or_drops_it() -> None:
    torch.manual_seed(0)
    passes = [factors(ShakeDrop(0.8, gate="batch"), 4) for _ in range(1000)]
    kept = [bool((forward == 1).all() and (backward == 1).all()) for forward, backward in passes]
    dropped = [bool((forward != 1).all() and (backward != 1).all()) for forward, backward in passes]
    assert sum(kept) + sum(dropped) == 1000
    assert stats.binomtest(sum(kept), 1000, 0.8).pvalue > RARE


def test_shake_shakes_factors_add_up_to_one() -> None:
    x = torch.randn(7, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = ShakeShake()(x, y)
    assert torch.allclose(out, x)
    out.sum().backward()
    assert torch.allclose(x.grad + y.grad, torch.ones_like(x))
    assert not torch.allclose(x.grad, y.grad)


@pytest.mark.parametrize(
    "make", [lambda: ShakeDrop(0.5), lambda: ShakeDrop(0.9), ShakeShake], ids=["0.5", "0.9", "ShakeShake"]
)
def test_the_expected_factor_is_that_of_evaluation(make: Callable[[], nn.Module]) -> None:
    forward, _ = drawn(make, passes=5_000, n=1)
    in_evaluation, backward_in_evaluation = factors(make().eval())
    assert torch.equal(in_evaluation, backward_in_evaluation)
    standard_error = forward.std() / math.sqrt(len(forward))
    assert abs(forward.mean() - in_evaluation) < SIGMAS * standard_error


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_evaluation_draws_nothing(make: Callable[[], nn.Module]) -> None:
    state = torch.get_rng_state()
    factors(make().eval())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_true_gradient_needs_the_same_draws(make: Callable[[], nn.Module]) -> None:
    shake = make()
    results, states = [], []
    for true in (False, True):
        torch.manual_seed(2)
        shake.true_gradient = true
        results.append(factors(shake, 5))
        states.append(torch.get_rng_state())
    (a, beta), (also_a, gradient) = results
    assert torch.equal(a, also_a) and torch.equal(gradient, a)
    assert torch.equal(a, beta) is (getattr(shake, "keep", 0) == 1)
    assert torch.equal(*states)


class Branches(nn.Module):
    """y_i = Σ_k f_ik·(x_i·w_k): a linear branch for each input of `shake`, which draws the factors f."""

    def __init__(self, shake: nn.Module) -> None:
        super().__init__()
        self.shake = shake
        self.weight = nn.Parameter(torch.randn(inputs_of(shake), 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.shake(*(x @ self.weight.T).T[:, :, None, None, None].unbind()).flatten()


@pytest.mark.parametrize("gamma", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_clean_pass_of_a_sam_step_alone_has_the_true_gradient(
    make: Callable[[], nn.Module], p: float, gamma: float
) -> None:
    """Against the gradient of ½Σy² written out: Σ_i y_i·b_ik·x_i with b = a in the clean pass of a SAM step,
    else β, and the same a and β in both passes."""
    torch.manual_seed(3)
    rho = 0.3
    model = Branches(make())
    x = torch.randn(4, 3, dtype=torch.float64)
    optimizer = RST(
        torch.optim.SGD(model.parameters(), lr=0.1), Constant(p), 1, rho=rho, gamma=gamma, module=model
    )

    def closure() -> Tensor:
        loss = model(x).square().sum() / 2
        loss.backward()
        return loss

    torch.manual_seed(4)
    optimizer.gradient(closure)
    state = torch.get_rng_state()

    torch.manual_seed(4)
    a, beta = factors(model.shake, 4)
    assert torch.equal(torch.get_rng_state(), state)
    a, beta = (torch.stack((f, 1 - f)[: len(model.weight)], 1) for f in (a, beta))

    def gradient(weight: Tensor, backward: Tensor) -> Tensor:
        y = (a * (x @ weight.T)).sum(1)
        return torch.einsum("i,ik,ij->kj", y, backward, x)

    theta = model.weight.detach()
    clean, plain = gradient(theta, a), gradient(theta, beta)
    perturbed = gradient(theta + rho * clean / clean.norm(), beta)
    expected = (1 - gamma) * clean + gamma * perturbed if p else plain
    assert torch.allclose(model.weight.grad, expected, rtol=1e-10)


def test_both_passes_and_what_follows_see_the_same_numbers() -> None:
    """A pass of another gradient must leave dropout, and the next step, the numbers that they had."""

    def masks(p: float) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        dropout = nn.Dropout(0.5)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), ShakeDrop(0.5), dropout, nn.Flatten(), nn.Linear(64, 1))
        seen: list[Tensor] = []
        dropout.register_forward_hook(lambda _module, _inputs, output: seen.append(output != 0))
        optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), Constant(p), 3, module=model)
        x = torch.randn(8, 3, 4, 4)

        def closure() -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return seen, torch.get_rng_state()

    plain, plain_state = masks(0.0)
    sam, sam_state = masks(1.0)
    assert not torch.equal(plain[0], plain[1])
    for i in range(3):
        assert torch.equal(sam[2 * i], plain[i])
        assert torch.equal(sam[2 * i + 1], plain[i])
    assert torch.equal(sam_state, plain_state)


def test_true_gradient_is_set_inside_and_put_back() -> None:
    model = nn.Sequential(ShakeDrop(0.5), nn.Sequential(ShakeShake()), nn.Linear(1, 1))
    first, second = model[0], model[1][0]
    first.true_gradient = True
    with true_gradient(model):
        with true_gradient(model[1]):
            assert first.true_gradient and second.true_gradient
        assert first.true_gradient and second.true_gradient
    assert first.true_gradient and not second.true_gradient
    assert not hasattr(model[2], "true_gradient")
    with true_gradient(None):
        pass


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_in_either_pass_leaves_the_flag_as_it_was(failing_pass: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), ShakeDrop(0.5))
    optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), Constant(1.0), 1, module=model)
    flags = []

    def closure() -> Tensor:
        flags.append(model[1].true_gradient)
        loss = model(torch.ones(1, 1, 1, 1)).sum()
        loss.backward()
        if len(flags) == failing_pass:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.gradient(closure)
    assert flags == [True, False][:failing_pass]
    assert not model[1].true_gradient
