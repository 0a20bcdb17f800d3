import numpy as np
import pytest

from surgery.deploy.measure.ratios import (
    early_stopping_estimate,
    fewest_sessions,
    ratio_of_medians,
    ratio_over_sessions,
)
from surgery.errors import UsageError


def simulated(rng, *, ratio=1.0, sessions=10, rounds=8, turn=1, session_sd=0.01):
    """Two candidates on a poor machine: each session has an effect of its own on each candidate, the machine drifts and
    slows down for a while now and then, and some queries take far longer."""
    steps = rng.normal(size=sessions * rounds).cumsum() * 0.01
    slow = 0.3 * (np.sin(np.linspace(0, rng.uniform(5, 60), sessions * rounds) + rng.uniform(0, 6)) > 0)
    machine = (steps + slow).reshape(sessions, rounds, 1)

    def times(typical):
        own = session_sd * rng.normal(size=(sessions, 1, 1))
        noise = rng.gamma(2.0, 0.015, size=(sessions, rounds, turn))
        outliers = (rng.random(noise.shape) < 0.03) * rng.exponential(0.5, size=noise.shape)
        return list(typical * np.exp(machine + own + noise + outliers))

    return times(100.0 * ratio), times(100.0)


@pytest.mark.parametrize("sessions", [6, 10, 20])
@pytest.mark.parametrize("turn", [1, 5])
def test_two_sessions_of_one_model_show_no_difference_in_95_of_100_runs(sessions, turn):
    rng = np.random.default_rng(sessions + turn)
    found = [
        ratio_over_sessions(*simulated(rng, sessions=sessions, turn=turn), confidence=0.95, rng=rng) for _ in range(200)
    ]
    assert np.mean([ratio.contains_1 for ratio in found]) >= 0.93
    assert all(ratio.sessions == sessions for ratio in found)


def test_the_interval_holds_the_true_ratio_and_tells_two_models_apart():
    rng = np.random.default_rng(1)
    found = [ratio_over_sessions(*simulated(rng, ratio=0.95), confidence=0.95, rng=rng) for _ in range(200)]
    assert np.mean([ratio.low <= 0.95 <= ratio.high for ratio in found]) >= 0.93
    assert np.mean([ratio.high < 1 for ratio in found]) >= 0.98
    assert abs(np.mean([ratio.value for ratio in found]) - 0.95) < 0.002


def test_the_interval_is_about_as_narrow_as_the_sessions_allow():
    """Nothing can be known better than by the sessions' own effects, of which a ratio has two."""
    rng = np.random.default_rng(2)
    found = [ratio_over_sessions(*simulated(rng, rounds=100), confidence=0.95, rng=rng) for _ in range(100)]
    half = np.median([(ratio.high - ratio.low) / 2 for ratio in found])
    assert 0.8 < half / (2.26 * 0.01 * np.sqrt(2 / 10)) < 1.2  # Student's t for 10 sessions


def test_one_session_alone_does_not_see_what_sessions_differ_by():
    """Why there are several: its interval holds 1 far less often than it says."""
    rng = np.random.default_rng(3)
    found = [ratio_over_sessions(*simulated(rng, sessions=1, rounds=200), 0.95, rng) for _ in range(20)]
    assert np.mean([ratio.contains_1 for ratio in found]) < 0.7


def test_one_session_covers_its_own_rounds():
    rng = np.random.default_rng(6)
    runs = [simulated(rng, sessions=1, rounds=100, session_sd=0.0) for _ in range(30)]
    found = [ratio_over_sessions(*run, 0.95, rng) for run in runs]
    assert np.mean([ratio.contains_1 for ratio in found]) >= 0.9
    assert {ratio.sessions for ratio in found} == {1}


def test_the_ratio_of_medians_of_rounds_is_bounded_by_blocks_of_them():
    rng = np.random.default_rng(7)
    times, baseline = 50.0 + rng.exponential(size=200), 100.0 + rng.exponential(size=200)
    ratio = ratio_of_medians(times, baseline, 0.95, rng)
    assert ratio.value == np.median(times) / np.median(baseline)
    assert ratio.low < ratio.value < ratio.high < 1.01 * ratio.low


def test_an_interval_of_more_confidence_is_wider_over_sessions_too():
    times, baseline = simulated(np.random.default_rng(4))
    sure, surer = (
        ratio_over_sessions(times, baseline, confidence, np.random.default_rng(0)) for confidence in (0.5, 0.99)
    )
    assert surer.low < sure.low < sure.value == surer.value < sure.high < surer.high


def test_sessions_that_all_say_the_same_leave_nothing_open():
    times = [np.full((4, 1), 50.0)] * 6
    ratio = ratio_over_sessions(times, [np.full((4, 1), 100.0)] * 6, 0.95, np.random.default_rng(0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("confidence", "fewest"), [(0.5, 3), (0.95, 6), (0.99, 8)])
def test_fewer_sessions_than_the_confidence_asks_for_are_refused(confidence, fewest):
    assert fewest_sessions(confidence) == fewest
    rng = np.random.default_rng(5)
    ratio_over_sessions(*simulated(rng, sessions=fewest), confidence, rng)
    message = f"{fewest - 1} sessions cannot bound a ratio with {confidence:.0%} confidence: take {fewest} or more"
    with pytest.raises(UsageError, match=message):
        ratio_over_sessions(*simulated(rng, sessions=fewest - 1), confidence, rng)


@pytest.mark.parametrize(("percentile", "fewest"), [(0.9, 64), (0.95, 130), (0.99, 662)], ids=["p90", "p95", "p99"])
def test_early_stopping_needs_as_many_queries_as_mlperfs_loadgen(percentile, fewest):
    times = np.arange(1.0, fewest + 1)
    assert early_stopping_estimate(times[:-1], percentile) is None
    assert early_stopping_estimate(times, percentile) == fewest  # none can be left out


def test_early_stopping_estimates_lie_above_the_percentile_99_times_in_100():
    rng = np.random.default_rng(0)
    true = -np.log(1 - 0.9)  # p90 of the exponential distribution
    estimates = [early_stopping_estimate(rng.exponential(size=500), 0.9) for _ in range(1000)]
    assert 0.98 <= np.mean(np.array(estimates) >= true) < 1
    assert np.median(estimates) < 1.25 * true


def test_early_stopping_leaves_out_the_slowest_that_the_rule_allows():
    assert early_stopping_estimate(np.arange(1.0, 501), 0.9) == 467  # LoadGen's loop: t - 1 = 33 of 500 are left out
