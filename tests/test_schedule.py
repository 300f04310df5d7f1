"""The schedules against the authors' definitions, their expected cost against plain sums, and the coin."""

import math
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rst import (
    Constant,
    Cosine,
    Linear,
    Periodic,
    Piecewise,
    Window,
    expected_propagations,
    propagations_std,
    uniform,
)
from rst.schedule import Systematic, Warmup, linear1, linear2, piecewise1, piecewise2, piecewise3

PROBABILITY = st.floats(0, 1)
STEPS = st.integers(1, 3000)
FAMILIES = st.one_of(
    st.builds(Constant, PROBABILITY),
    st.builds(Piecewise, PROBABILITY, PROBABILITY, PROBABILITY),
    st.builds(Linear, PROBABILITY, PROBABILITY),
    st.builds(Cosine, PROBABILITY, PROBABILITY),
    st.builds(Periodic, st.integers(1, 50)),
    st.tuples(PROBABILITY, PROBABILITY).map(lambda ends: Window(min(ends), max(ends))),
)
SCHEDULES = FAMILIES | st.builds(Warmup, FAMILIES, st.integers(0, 4000))

# name: (ours, the authors' p(t) written out)
AUTHORS = {
    "constant": (Constant, lambda p, t, T: p),
    "piecewise1": (piecewise1, lambda p, t, T: 0 if t <= p * T else 1),
    "piecewise2": (piecewise2, lambda p, t, T: 1 if t <= p * T else 0),
    "piecewise3": (piecewise3, lambda p, t, T: p if t <= T / 2 else 1 - p),
    "linear1": (
        linear1,
        lambda p, t, T: 2 * p * t / T if p <= 0.5 else (2 * p - 1) + 2 * (1 - p) * t / T,
    ),
    "linear2": (linear2, lambda p, t, T: p + (1 - 2 * p) * t / T),
}


@pytest.mark.parametrize("total_steps", [1, 7, 100, 39000])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", AUTHORS)
def test_presets_are_the_authors(name, p, total_steps):
    ours, theirs = AUTHORS[name]
    boundary = math.floor(p * total_steps)
    for t in {0, 1, boundary, boundary + 1, total_steps // 2, total_steps // 2 + 1, total_steps - 1}:
        assert ours(p)(t, total_steps) == pytest.approx(theirs(p, t, total_steps), abs=1e-15), t


def test_the_first_step_after_the_boundary_is_floor_plus_one():
    p = [Piecewise(0.2, 0.9, boundary=0.25)(t, 10) for t in range(10)]
    assert p == [0.2] * 3 + [0.9] * 7  # ⌊2.5⌋ + 1 = 3


def test_cosine_periodic_and_warmup_by_hand():
    cosine = Cosine(0.2, 1.0)
    assert [cosine(t, 4) for t in (0, 2)] == pytest.approx([0.2, 0.6])
    assert cosine(1, 4) == pytest.approx(0.6 - 0.4 * math.sqrt(0.5))
    assert [Periodic(3)(t, 8) for t in range(8)] == [1, 0, 0, 1, 0, 0, 1, 0]
    assert [Warmup(Linear(0, 1), 2)(t, 4) for t in range(4)] == [0, 0, 0.5, 0.75]
    assert [Warmup(0.5, 2)(t, 4) for t in range(4)] == [0, 0, 0.5, 0.5]


def test_window_by_hand():
    assert [Window(0.25, 0.75)(t, 8) for t in range(8)] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert all(Window(0, 1)(t, 7) == 1 and Window(0.5, 0.5)(t, 7) == 0 for t in range(7))
    assert expected_propagations(Window(0.6, 0.85), 1000) == 1250


@given(SCHEDULES, STEPS)
def test_an_array_of_steps_gives_the_probability_of_each(schedule, total_steps):
    p = [schedule(t, total_steps) for t in range(total_steps)]
    assert all(-1e-15 <= x <= 1 + 1e-15 for x in p)
    # Not bit for bit: numpy's cosine may round differently from the C library's.
    np.testing.assert_allclose(schedule(np.arange(total_steps), total_steps), p, rtol=0, atol=1e-15)


@given(SCHEDULES, STEPS)
def test_cost_is_the_sum_over_all_steps(schedule, total_steps):
    p = [schedule(t, total_steps) for t in range(total_steps)]
    variance = math.fsum(x * (1 - x) for x in p)
    assert expected_propagations(schedule, total_steps) == pytest.approx(
        total_steps + math.fsum(p), rel=1e-12
    )
    assert propagations_std(schedule, total_steps) ** 2 == pytest.approx(variance, rel=1e-12, abs=1e-11)


def test_sums_known_in_closed_form_are_exact():
    # gamma="matched" is 1 / mean p: an error of summation would change what is trained.
    assert expected_propagations(Constant(0.1), 39000) == 39000 + 3900
    assert expected_propagations(Linear(0, 1), 78000) == 78000 + 77999 / 2
    assert expected_propagations(Cosine(0, 1), 78000) == 78000 + 77999 / 2
    assert propagations_std(Constant(0.5), 10000) == 50


@pytest.mark.parametrize(
    ("schedule", "total"),
    [
        (lambda t, T: t / T, 1.5),
        (lambda t, T: 0.25, 1.0),  # an array of steps gives one number
        (lambda t, T: min(0.5, t / T), 1.25),  # an array of steps raises
        (Warmup(lambda t, T: 1.0 if t in (0, 2) else 0.0, 1), 1.0),
    ],
)
def test_any_callable_is_a_schedule(schedule, total):
    assert expected_propagations(schedule, 4) == 4 + total


def test_errors_of_a_schedule_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        expected_propagations(lambda t, T: 1 / (3 - int(t)), 4)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        expected_propagations(Constant(0.5), 0)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("family", [Constant, Piecewise, Linear, Cosine])
def test_families_have_the_mean_they_are_asked_for(family, p, rising):
    total_steps = 1000
    mean = expected_propagations(family.with_mean(p, rising), total_steps) / total_steps - 1
    # Ends that differ by d miss p by d/2T (the sum stops one step short of T), the boundary step by 1/T.
    assert mean == pytest.approx(p, abs=1 / total_steps)
    if p in (0.0, 1.0):
        assert mean == p


def test_rising_families_take_their_sam_steps_late():
    assert Piecewise.with_mean(0.25) == Piecewise(0.0, 1.0, boundary=0.75)
    assert Piecewise.with_mean(0.25, rising=False) == Piecewise(1.0, 0.0, boundary=0.25)
    assert Linear.with_mean(0.25) == Linear(0.0, 0.5)
    assert Linear.with_mean(0.75, rising=False) == Linear(1.0, 0.5)
    assert Cosine.with_mean(0.75) == Cosine(0.5, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(1.5), "p must be a number in [0, 1], got 1.5"),
        (lambda: Constant(math.nan), "p must be a number in [0, 1], got nan"),
        (lambda: Constant("high"), "p must be a number in [0, 1], got 'high'"),
        (lambda: Linear.with_mean(-0.1), "p must be a number in [0, 1], got -0.1"),
        (lambda: Piecewise(0, 1, boundary=2), "boundary must be a number in [0, 1], got 2"),
        (lambda: Cosine(0, 1.01), "end must be a number in [0, 1], got 1.01"),
        (lambda: Window(0.9, 0.5), "start=0.9 must not be above its end=0.5"),
        (lambda: Window(0.5, 1.5), "end must be a number in [0, 1], got 1.5"),
        (lambda: Periodic(0), "every must be a whole number of steps ≥ 1, got 0"),
    ],
)
def test_parameters_are_validated(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_coin_is_uniform():
    # The sample is fixed, so the test is deterministic; a fair coin would have failed with probability 1e-3
    # for each seed.
    for seed in (0, 1, 12345):
        coins = [uniform(seed, step) for step in range(20000)]
        assert all(0 <= u < 1 for u in coins)
        assert scipy.stats.kstest(coins, "uniform").pvalue > 1e-3
        # Neighbouring steps and neighbouring seeds are uncorrelated: |r| < 4/√n.
        assert abs(scipy.stats.pearsonr(coins[:-1], coins[1:]).statistic) < 4 / math.sqrt(20000)
        other = [uniform(seed + 1, step) for step in range(20000)]
        assert abs(scipy.stats.pearsonr(coins, other).statistic) < 4 / math.sqrt(20000)


def test_the_coin_is_part_of_every_record():
    # Recorded results depend on these values: they must never change.
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0)] == [
        0.856153005662195,
        0.46887419067603087,
        0.40303891278509085,
    ]


def test_the_offset_is_part_of_every_record():
    decide = Systematic(Constant(0.3), 20, seed=0)
    assert [t for t in range(20) if decide(t)] == [1, 4, 8, 11, 14, 18]


def test_sam_steps_of_a_smaller_p_are_a_subset():
    def sam_steps(p):
        return {t for t in range(2000) if uniform(3, t) < Constant(p)(t, 2000)}

    assert sam_steps(0.3) < sam_steps(0.7)


def test_a_seed_is_a_non_negative_integer():
    with pytest.raises(ValueError, match="got -1"):
        uniform(-1, 0)


@given(SCHEDULES, st.integers(1, 300), st.integers(0, 5))
def test_systematic_sampling_takes_as_many_sam_steps_as_expected(schedule, total_steps, seed):
    """To within one, in every stretch of the run; and where p is 0 or 1, that is what it does."""
    decide = Systematic(schedule, total_steps, seed)
    p = [schedule(t, total_steps) for t in range(total_steps)]
    X = [decide(t) for t in range(total_steps)]
    ahead = np.cumsum(X) - np.cumsum(p)
    assert ahead.max() - ahead.min() < 1 + 1e-9 and abs(ahead[-1]) < 1 + 1e-9
    assert all(x == (q == 1) for x, q in zip(X, p, strict=True) if q in (0, 1))


def test_systematic_sampling_has_the_schedule_s_probabilities():
    """Over seeds: each step's frequency is within 4 standard deviations of p(t), and the number of SAM steps
    varies as `propagations_std` says."""
    schedule, total_steps, seeds = Linear(0.1, 0.6), 25, 500
    X = np.array(
        [[Systematic(schedule, total_steps, seed)(t) for t in range(total_steps)] for seed in range(seeds)]
    )
    p = schedule(np.arange(total_steps), total_steps)
    assert (abs(X.mean(0) - p) < 4 * np.sqrt(p * (1 - p) / seeds)).all()
    std = propagations_std(schedule, total_steps, "systematic")
    assert std == pytest.approx(0.5) and abs(X.sum(1).std() / std - 1) < 0.01  # Σp = 8.5
    assert propagations_std(schedule, total_steps) > 2


def test_systematic_sampling_can_begin_anywhere():
    """Like a run that is resumed, and resumed again from an earlier checkpoint."""
    whole = Systematic(Cosine(0.1, 0.9), 200, 3)
    X = [whole(t) for t in range(200)]
    for start in (150, 30, 30):
        resumed = Systematic(Cosine(0.1, 0.9), 200, 3)
        assert [resumed(t) for t in range(start, 200)] == X[start:]
        assert [whole(t) for t in range(start, 200)] == X[start:]
