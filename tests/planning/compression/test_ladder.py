"""The order of recipes, and what measurements rule out."""

from dataclasses import replace

import pytest

from lightning_accel import Budgets
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.planning.compression.floor import Smallest, check_budgets
from lightning_accel.planning.compression.ladder import FAILED, Ladder, Result
from tests.planning.compression.test_candidates import candidate


def walk(budgets, answers, targets=("onnxruntime",), epochs=6, **settings):
    """Names of the stages that ran, and what was ruled out; ``answers`` measure a recipe."""
    ladder, results, out = Ladder(budgets, ["onnxruntime"], targets, epochs, True, **settings), [], []
    for recipe, reason in ladder.steps(results):
        out.append((recipe, reason))
        result = answers(recipe) if not reason else Result(recipe, "ruled out", reason)
        results.append(result)
        if result.fitting(budgets):
            break
    return out


@pytest.mark.parametrize(("high", "last"), [(0.3, "high"), (0.8, "trained")])
def test_effort_rises_until_accuracy_fits(high, last):
    lost = {"float": 0.0, "low": 2.0, "standard": 1.0, "high": high, "trained": 0.2}

    def answers(recipe):
        time = 3.0 if recipe.stage == "float" else 1.0
        return Result(recipe, candidates=[candidate(lost[recipe.effort or recipe.stage], time)])

    out = walk(Budgets(0.5, 1.5), answers)
    assert [recipe.effort for recipe, reason in out if not reason] == [
        *(None, "low", "standard", "high"),
        *(["trained"] if last == "trained" else []),
    ]


def test_training_does_not_make_integers_faster():
    def answers(recipe):
        time = 1.0 if recipe.reduction else 3.0
        return Result(recipe, candidates=[candidate(0.0 if recipe.stage != "channels" else 9.0, time)])

    out = walk(Budgets(0.5, 1.5), answers)
    ran = [recipe.stage for recipe, reason in out if not reason]
    assert ran == ["float", "ptq", "channels", "all"]
    assert all(
        "its speed and size are those of" in reason
        for recipe, reason in out
        if recipe.stage in ("qat", "ptq") and reason
    )


def test_channels_are_asked_for_what_is_missing_and_again_for_more():
    def answers(recipe):
        if recipe.stage != "channels":
            return Result(recipe, candidates=[candidate(0.0, 4.0, 4000)])
        return Result(recipe, candidates=[candidate(0.0, 4.0 / recipe.reduction**0.8, 100)])

    out = walk(Budgets(0.5, 2.0), answers)
    factors = [recipe.reduction for recipe, reason in out if recipe.stage == "channels" and not reason]
    assert factors[0] == pytest.approx(2.0 * 1.05)
    assert len(factors) == 2
    assert {recipe.measure for recipe, _ in out if recipe.stage == "channels"} == {"latency_reduction"}
    assert 4.0 / factors[1] ** 0.8 <= 2.0 < 4.0 / factors[0] ** 0.8


def test_what_is_fast_enough_keeps_its_channels():
    def answers(recipe):
        return Result(recipe, candidates=[candidate(5.0 if recipe.target else 0.0, 1.0 if recipe.target else 3.0)])

    out = walk(Budgets(0.5, 1.5), answers)
    assert [reason for recipe, reason in out if recipe.stage == "all"] == 2 * [
        "with all channels it is fast and small enough already; fewer can only cost accuracy"
    ]


def test_an_arithmetic_that_failed_is_not_trained():
    def answers(recipe):
        if recipe.target:
            return Result(recipe, FAILED, "no kernels")
        return Result(recipe, candidates=[candidate(0.0, 3.0)])

    out = walk(Budgets(0.5, 1.5), answers)
    reasons = [reason for recipe, reason in out if recipe.stage in ("qat", "all")]
    assert reasons == 3 * ["int8 for onnxruntime failed: no kernels"]


def test_trainings_are_distilled_and_have_lengths():
    out = walk(
        Budgets(0.5, 0.5), lambda recipe: Result(recipe, candidates=[candidate(1.0, 0.4 if recipe.target else 2.0)])
    )
    lengths = {recipe.stage: recipe.epochs for recipe, _ in out}
    assert lengths == {"float": 0, "ptq": 0, "qat": 2, "channels": 6, "all": 12}
    assert all(recipe.distilled == recipe.trains for recipe, _ in out)
    assert all(recipe.trains == (recipe.command == "fit") for recipe, _ in out)


def test_a_budget_below_the_smallest_network_is_refused():
    smallest = [Smallest("onnxruntime", None, 0.5, 0.55, 900), Smallest("onnxruntime", "onnxruntime", 0.4, 0.44, 400)]
    check_budgets(Budgets(1, 0.4, 400), smallest)
    says = r"`max_latency_ms` must be reachable, but got 0.1: .* int8 in onnxruntime, takes 0.440 ms, 4.40 times"
    with pytest.raises(InvalidArgumentError, match=says):
        check_budgets(Budgets(1, 0.1), smallest)
    with pytest.raises(
        InvalidArgumentError, match=r"`max_bytes` must be reachable, but got 200: .* has 400 bytes, 2.00 times"
    ):
        check_budgets(Budgets(1, None, 200), smallest)
    ladder = Ladder(Budgets(0.5, 0.45), ["onnxruntime"], [], 3, True, smallest=smallest)
    steps = ladder.steps(results := [])
    next(steps)
    results.append(Result(next(ladder.steps([]))[0], candidates=[candidate(0.0, 2.0)]))
    recipe, reason = next(steps)
    assert recipe.stage == "channels"
    assert "even the smallest network that channel pruning can leave takes 0.550 ms, 1.22 times" in reason


def test_what_has_to_lose_less_comes_first():
    def answers(recipe):
        time = 1.0 if recipe.reduction else 2.0 if recipe.target else 8.0
        return Result(recipe, candidates=[candidate(9.0, time)])

    out = walk(Budgets(0.5, 1.5), answers)
    stages = [recipe.stage for recipe, reason in out if not reason and recipe.reduction]
    assert stages == ["all", "channels", "all"]


def test_a_factor_that_was_aimed_better_is_the_one_that_is_trained():
    aimed = Ladder(Budgets(0.5, None, 100), ["onnxruntime"], [], 6, True)
    aimed.aim = lambda recipe: replace(recipe, reduction=7.0)
    results = [Result(next(aimed.steps([]))[0], candidates=[candidate(0.0, 1.0, 200)])]
    steps = aimed.steps(results)
    next(steps)
    assert next(steps)[0].reduction == 7.0
