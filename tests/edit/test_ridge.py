"""Least squares on sums, against NumPy on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.edit.ridge import Problems, Sums
from surgery.edit.shelf import Shelf


def draw(groups, n, p, o, seed=0):
    """Rows of inputs and targets, and weights that are there already."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, n, p)) @ random.normal(size=(groups, p, p)) + random.normal(size=(groups, 1, p))
    y = x @ random.normal(size=(groups, p, o)) + random.normal(size=(groups, n, o)) + 3
    return x, y, random.normal(size=(groups, p, o))


def add(x, y, *, batches=3):
    sums = Sums.zeros(len(x), x.shape[2], y.shape[2], torch.device("cpu"))
    for rows in np.array_split(np.arange(x.shape[1]), batches):
        sums.add(torch.from_numpy(x[:, rows]), torch.from_numpy(y[:, rows]))
    return sums


def solve(sums, carved, damping, *, constant):
    with Shelf() as shelf:
        return Problems(sums, carved, constant=constant, shelf=shelf).solve(damping)


def least_squares(x, y, carved, damping, constant):
    """One problem, by rows that stand for the damping."""
    n, p = x.shape
    scale = (x - x.mean(0) * constant).var(0).mean() * n if constant else np.square(x).sum(0).mean()
    inputs = np.concatenate([x, np.ones((n, 1))], 1) if constant else x
    drawn = np.sqrt(damping * scale) * np.eye(p, inputs.shape[1])
    whole = np.concatenate([inputs, drawn])
    found, *_ = np.linalg.lstsq(whole, np.concatenate([y, drawn[:, :p] @ carved]), rcond=None)
    return (found[:p], found[p]) if constant else (found, np.zeros(y.shape[1]))


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 3.0])
def test_the_fit_is_that_of_least_squares_on_all_rows(damping, constant):
    x, y, carved = draw(2, 50, 4, 3)
    fit = solve(add(x, y), torch.from_numpy(carved), torch.tensor([damping, 10 * damping]), constant=constant)
    for k, own in enumerate((damping, 10 * damping)):
        weight, offset = least_squares(x[k], y[k], carved[k], own, constant)
        np.testing.assert_allclose(fit.weight[k], weight, atol=1e-7)
        np.testing.assert_allclose(fit.constant[k], offset, atol=1e-7)


def test_an_infinite_damping_keeps_the_weights_and_moves_the_constant():
    x, y, carved = draw(1, 40, 4, 3)
    fit = solve(add(x, y), torch.from_numpy(carved), torch.tensor([float("inf")]), constant=True)
    np.testing.assert_array_equal(fit.weight, carved)
    np.testing.assert_allclose(fit.constant, (y - x @ carved).mean(1), atol=1e-12)


def test_inputs_that_never_vary_keep_their_weights():
    x, y, carved = draw(1, 40, 4, 3)
    x[:, :, 1] = 0.7
    fit = solve(add(x, y), torch.from_numpy(carved), torch.tensor([1e-6]), constant=True)
    np.testing.assert_array_equal(fit.weight[0, 1], carved[0, 1])
    rest = [0, 2, 3]
    weight, _ = least_squares(x[0][:, rest], y[0], carved[0][rest], 1e-6, True)
    np.testing.assert_allclose(fit.weight[0, rest], weight, atol=1e-7)


def test_errors_are_the_squared_errors_over_rows():
    x, y, carved = draw(2, 30, 4, 3)
    fit = solve(add(x, y), torch.from_numpy(carved), torch.tensor([0.1, 0.1]), constant=True)
    predicted = x @ fit.weight.numpy() + fit.constant.numpy()[:, None]
    found = fit.errors(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found, np.square(predicted - y).sum(1))


def test_a_problem_without_a_solution_is_not_finite_and_leaves_the_others():
    x, y, carved = draw(2, 30, 4, 3)
    sums = add(x, y)
    for rows in sums.xx:
        rows[0] *= -1
    fit = solve(sums, torch.from_numpy(carved), torch.tensor([1e-6, 1e-6]), constant=False)
    assert not fit.weight[0].isfinite().any()
    assert fit.weight[1].isfinite().all()


def test_values_that_are_not_finite_are_seen():
    x, y, _ = draw(1, 30, 4, 3)
    assert add(x, y).finite()
    x[0, 3, 2] = np.inf
    assert not add(x, y).finite()
