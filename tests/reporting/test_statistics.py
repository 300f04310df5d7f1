import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import column, records
from scipy import stats

from rst.reporting.statistics import Estimate, estimate, holm, paired_difference, values


def test_estimate_by_hand():
    # s² = (4 + 1 + 0 + 1 + 4)/4 = 2.5; t(0.975, 4) = 2.776445; 2.776445·√(2.5/5) = 1.963243
    value = estimate([1, 2, 3, 4, 5])
    assert (value.mean, value.n) == (3, 5)
    assert value.std == pytest.approx(1.5811388)
    assert (value.low, value.high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-6)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=12).filter(lambda x: np.std(x) > 1e-6))
def test_the_interval_is_that_of_scipys_t_test(x):
    value, expected = estimate(x), stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (value.low, value.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_too_few_or_equal_values_have_no_interval():
    assert estimate([4.0]) == pytest.approx(Estimate(mean=4.0, n=1), nan_ok=True)
    assert estimate([]) == pytest.approx(Estimate(), nan_ok=True)
    assert estimate([3.0] * 5) == pytest.approx(Estimate(3.0, 0.0, n=5), nan_ok=True)
    assert np.isnan(estimate([0.1 + 0.2, 0.3, 0.3]).low)  # equal up to rounding


def test_differences_are_paired_over_common_seeds():
    ours = pd.Series([7.0, 9.0, 8.0, 50.0], index=[3, 0, 1, 8])
    theirs = pd.Series([5.0, 6.0, 9.0, -50.0], index=[0, 1, 3, 9])
    assert paired_difference(ours, theirs).to_dict() == {0: 4.0, 1: 2.0, 3: -2.0}


def test_values_by_seed():
    (_, _, rst), made = column().rows, records()
    assert values("test_error", rst.runs, made.joined).to_dict() == pytest.approx(
        {0: 7, 1: 8, 2: 9, 3: 10, 4: 11}
    )
    assert values("test_loss", rst.runs, made.joined).tolist() == pytest.approx([0.7] * 5)
    assert values("eta", {7: "rrst2"}, made.joined).to_dict() == pytest.approx({7: 1 + 292 / 600})
    assert values("lambda_max", rst.runs, made.joined).empty  # not measured
    assert values("younger", rst.runs, made.joined).empty


def test_holm_by_hand():
    # Sorted 0.01·4, 0.02·3, 0.03·2, 0.6·1; none below the one before it.
    assert holm([0.03, 0.01, 0.6, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.6, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_rejects_what_the_step_down_procedure_does(p):
    rejected = set()
    for k, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - k) >= 0.05:
            break
        rejected.add(int(i))
    assert set(np.flatnonzero(holm(p) < 0.05).tolist()) == rejected
