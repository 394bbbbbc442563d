"""Batched L-BFGS against scikit-learn: logistic regression and support vector machines; average precision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from evals_kit import make_job
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC
from sslbench_plugins.evals.logistic import Logistic, LogisticConfig
from torch import Tensor
from torch.nn import functional as F

from sslbench.evaluation.classifiers import FeatureScaling
from sslbench.evaluation.convex import fit_logistic, fit_svms
from sslbench.evaluation.lbfgs import minimize
from sslbench.evaluation.multilabel import average_precision, class_precisions, shares_of, unit_inputs


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    table = make_job(Logistic(LogisticConfig()), Path("unused")).features("train")
    return FeatureScaling.fit("standardize", table.features)(table.features), table.labels


def test_quadratics_of_very_different_scale_are_solved_side_by_side() -> None:
    scale = torch.tensor([1e-3, 1.0, 1e3])
    stretch = torch.logspace(0, 3, 20)
    middle = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))

    def objective(point: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        away = point - middle[numbers]
        slope = scale[numbers, None] * stretch * away
        return (slope * away).sum(1) / 2, slope

    found = minimize(objective, torch.zeros(3, 20), tolerance=1e-6)
    assert found.converged.all()
    torch.testing.assert_close(found.points, middle, rtol=1e-3, atol=1e-3)


def test_what_does_not_settle_in_time_is_told() -> None:
    found = minimize(lambda x, _: (x.square().square().sum(1), 4 * x**3), torch.ones(1, 3), max_steps=2)
    assert not found.converged.any()
    assert found.steps == 2
    assert bool((found.points < 1).all())


def test_problems_do_not_influence_each_other(digits: tuple[Tensor, Tensor]) -> None:
    inputs, labels = F.pad(digits[0], (0, 1), value=1.0), digits[1]
    strengths = torch.tensor([1e-4, 1e-2])
    both = fit_logistic(inputs, labels, 10, strengths, tolerance=1e-5, max_steps=500)
    alone = fit_logistic(inputs, labels, 10, strengths[1:], tolerance=1e-5, max_steps=500)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)


def test_logistic_regression_has_scikit_learns_minimum(digits: tuple[Tensor, Tensor]) -> None:
    features, labels = digits
    strengths = torch.tensor([1e-3, 1e-2, 1e-1])
    inputs = F.pad(features, (0, 1), value=1.0)
    fitted = fit_logistic(inputs, labels, 10, strengths, tolerance=1e-6, max_steps=1000)
    for strength, ours in zip(strengths.tolist(), fitted, strict=True):
        reference = LogisticRegression(C=1 / (len(labels) * strength), tol=1e-6, max_iter=2000)
        reference.fit(features.double().numpy(), labels.numpy())
        theirs = torch.from_numpy(reference.coef_).float()
        torch.testing.assert_close(ours[:, :-1], theirs, rtol=5e-3, atol=5e-3)
        assert (inputs @ ours.T).argmax(1).tolist() == reference.predict(features.double().numpy()).tolist()


@pytest.mark.parametrize("cost", [0.01, 0.5, 10.0])
def test_machines_are_those_of_scikit_learn(digits: tuple[Tensor, Tensor], cost: float) -> None:
    features, labels = digits
    inputs, sign = unit_inputs(features), torch.where(labels < 3, 1.0, -1.0)[None]
    ours = fit_svms(inputs, sign, shares_of(sign), torch.tensor([cost]), tolerance=1e-6, max_steps=2000)[0]
    reference = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-6, max_iter=20000, random_state=0)
    reference.fit(inputs[:, :-1].double().numpy(), sign[0].numpy())
    theirs = torch.tensor([*reference.coef_[0], *reference.intercept_], dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_a_machine_does_not_see_images_of_no_weight(digits: tuple[Tensor, Tensor]) -> None:
    inputs, sign = unit_inputs(digits[0]), torch.where(digits[1] < 3, 1.0, -1.0)[None]
    seen = torch.arange(len(inputs)) % 3 > 0
    options = {"tolerance": 1e-6, "max_steps": 2000}
    masked = fit_svms(inputs, sign, shares_of(sign) * seen, torch.ones(1), **options)
    without = fit_svms(inputs[seen], sign[:, seen], shares_of(sign[:, seen]), torch.ones(1), **options)
    torch.testing.assert_close(masked, without, rtol=1e-3, atol=1e-3)


def test_average_precision_of_the_published_program() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    positive = torch.tensor([True, False, True, False, True])
    assert average_precision(scores, positive) == pytest.approx(0.755556, abs=5e-7)
    assert average_precision(scores.flip(0), positive.flip(0)) == pytest.approx(0.755556, abs=5e-7)


def test_average_precision_is_at_least_the_stepwise_one_and_equal_where_precision_only_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, positive = torch.rand(200, generator=generator), torch.rand(200, generator=generator) < 0.2
    stepwise = average_precision(scores, positive, monotone=False)
    assert stepwise == pytest.approx(average_precision_score(positive, scores))
    assert average_precision(scores, positive) > stepwise
    falling = torch.arange(10) < 4
    assert average_precision(-torch.arange(10.0), falling) == 1
    assert average_precision(torch.zeros(10), falling) == pytest.approx(0.4)  # ties say nothing
    assert math.isnan(average_precision(scores, torch.zeros(200, dtype=torch.bool)))


def test_difficult_images_are_left_out_or_absent() -> None:
    scores = torch.tensor([[3.0], [2.0], [1.0]])
    targets = torch.tensor([[-1], [1], [0]])
    assert class_precisions(scores, targets) == [1.0]
    assert class_precisions(scores, targets, ignore_difficult=False) == [0.5]
