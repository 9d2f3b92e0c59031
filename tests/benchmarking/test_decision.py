import json

import pytest

from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison, LatencyPoint, VariantResult
from lightning_accel.benchmarking.decision import Budgets, choose_variant, resolution
from lightning_accel.reports.comparison_text import render_comparison

PASSED = {"passed": True, "failures": []}


def variant(name, speedup=1.0, low=None, ms=1.0, size=1000, accuracy=0.9, **kwargs):
    low = speedup if low is None else low
    points = [LatencyPoint(b, 1, b * ms, b * ms, b * ms, 1e3 / ms, speedup, low, speedup, 20, 200) for b in (1, 32)]
    engine, precision = name.split()[0], name.split()[-1]
    settings = {"samples": 1000, "kernels": PASSED, "points": points, "file": "f", **kwargs}
    return VariantResult(name, engine, precision, file_bytes=size, accuracy=accuracy, agreement=accuracy, **settings)


def comparison(*variants, null_high=1.01, waiting=0.0):
    null = {"value": 1.0, "low": 0.99, "high": null_high}
    nulls = [{"batch": b, "callers": 1, **null, "waiting": waiting, "noisy": False} for b in (1, 32)]
    told = {"batches": (1, 32), "callers": (1,), "threads": 2, "data": "1,000 held-out samples", "agreement_with": "x"}
    plain = variant("onnxruntime fp32", size=4000)
    return Comparison({"cpu": "x"}, told, "onnxruntime fp32", {**null, "points": nulls}, False, [plain, *variants])


def test_the_fastest_that_fits_ships_by_the_lower_end_of_its_interval():
    found = comparison(variant("openvino int8", 2.0, low=1.2), variant("onnxruntime int8", 1.5, low=1.4))
    decision = choose_variant(found, Budgets(max_drop=0.5))
    assert decision["ship"] == "onnxruntime int8"
    assert decision["why"] == (
        "onnxruntime int8 ships: 1.50x [1.40, 1.50] as fast as fp32 in ONNX Runtime at batch 32; its accuracy stays on 1,000 "
        "samples; its file has 1,000 bytes instead of 4,000."
    )
    assert decision["refused"] == {}
    assert decision["budgets"] == {"max_drop": 0.5, "max_latency_ms": None, "max_bytes": None, "batch": 32}


@pytest.mark.parametrize(("low", "null_high"), [(0.98, 1.01), (1.0, 1.0), (1.04, 1.05)])
def test_plain_fp32_ships_where_nothing_is_clearly_faster(low, null_high):
    decision = choose_variant(
        comparison(variant("openvino int8", 1.1, low=low), null_high=null_high), Budgets(max_drop=0.5)
    )
    assert decision["ship"] == "onnxruntime fp32"
    assert "no variant that fits is clearly faster. The fastest of them, openvino int8, is 1.10x" in decision["why"]
    assert (
        choose_variant(comparison(variant("openvino int8", 1.1, low=1.06), null_high=1.05), Budgets())["ship"]
        == "openvino int8"
    )
    assert choose_variant(comparison(), Budgets())["why"] == "Plain fp32 in ONNX Runtime ships: no other variant fits."


@pytest.mark.parametrize(
    ("budgets", "changes", "reason"),
    [
        ({"max_drop": 0.5}, {"accuracy": 0.894}, "accuracy drops by 0.60 points, more than 0.5"),
        ({"max_latency_ms": 10.0}, {}, "p50 at batch 32 is 32.000 ms, more than 10"),
        ({"max_bytes": 999}, {}, "its file has 1,000 bytes, more than 999"),
        ({}, {"status": "failed", "reason": "its process died"}, "failed: its process died"),
        ({}, {"unshippable": "made anew"}, "not shippable: made anew"),
        ({}, {"kernels": None}, "no held-out samples to verify its kernels on"),
        (
            {},
            {"kernels": {"passed": False, "failures": ["a", "b"]}},
            "its kernels diverge from the file on this machine: a; b",
        ),
        ({}, {"points": []}, "not measured at batch 32"),
        ({}, {"accuracy": None}, "neither accuracy nor agreement could be computed"),
    ],
)
def test_a_variant_is_refused_with_the_reason(budgets, changes, reason):
    fits = choose_variant(comparison(variant("openvino int8", 2.0)), Budgets())
    assert fits["ship"] == "openvino int8"
    decision = choose_variant(comparison(variant("openvino int8", 2.0, **changes)), Budgets(**budgets))
    assert decision["ship"] != "openvino int8"
    assert reason in decision["refused"]["openvino int8"]


def test_noise_is_said():
    found = comparison(variant("openvino int8", 1.9), null_high=1.2, waiting=0.5)
    found.null["points"][1]["noisy"] = True
    assert (
        "- null run, batch 32, 1 caller: 1.000x [0.990, 1.200], while other processes had the CPUs for 50% of the time: too noisy "
        "for fine distinctions" in render_comparison(found)
    )
    slightly = choose_variant(comparison(variant("openvino int8", 1.15), null_high=1.2), Budgets())
    assert slightly["ship"] == "onnxruntime fp32"
    assert slightly["why"].endswith("above what the null run gives (1.20). On a quiet machine another may ship.")


def test_a_drop_of_exactly_the_budget_is_kept():
    found = comparison(variant("openvino int8", 2.0, accuracy=0.895))  # in floats 0.9 - 0.895 is more than 0.005
    assert choose_variant(found, Budgets(max_drop=0.5))["ship"] == "openvino int8"
    assert "its accuracy drops by 0.50 points" in choose_variant(found, Budgets(max_drop=0.5))["why"]


def test_latency_counts_at_the_batch_size_named():
    found = comparison(variant("openvino int8", 2.0, ms=0.5))
    assert choose_variant(found, Budgets(max_latency_ms=0.6, batch=1))["ship"] == "openvino int8"
    assert choose_variant(found, Budgets(max_latency_ms=0.6))["ship"] is None
    with pytest.raises(ValueError, match=r"Argument `batch` must be one of the measured sizes \[1, 32\], but got 8"):
        choose_variant(found, Budgets(batch=8))


def test_a_slower_variant_ships_only_where_fp32_does_not_fit_and_that_is_said():
    decision = choose_variant(comparison(variant("onnxruntime int8", 0.8)), Budgets(max_bytes=2000))
    assert decision["ship"] == "onnxruntime int8"
    assert decision["why"].endswith("It is not clearly faster than fp32, which does not fit the budgets.")
    assert decision["refused"]["onnxruntime fp32"] == "its file has 4,000 bytes, more than 2,000"


def test_nothing_fits_names_the_nearest():
    found = comparison(
        variant("onnxruntime int8", 1.5), variant("openvino int8", 1.5, size=700, unshippable="made anew")
    )
    decision = choose_variant(found, Budgets(max_bytes=500))
    assert decision["ship"] is None
    assert decision["why"] == (
        "No variant fits the budgets. The nearest is onnxruntime int8: its file has 1,000 bytes, more than 500."
    )


def test_an_engine_for_another_machine_is_named():
    engine = variant("tensorrt int8", status="not here", reason="needs an NVIDIA GPU", points=[])
    decision = choose_variant(comparison(variant("openvino int8", 2.0), engine), Budgets())
    nothing = choose_variant(comparison(variant("openvino int8", 2.0), engine), Budgets(max_bytes=1))
    assert nothing["ship"] is None
    assert nothing["why"].endswith("repeat the benchmark on the target machine.")
    assert decision["ship"] == "openvino int8"
    assert decision["why"].endswith(
        "tensorrt int8 was excluded because it can't run on this machine: repeat the benchmark on the target machine."
    )
    for other in ({"file": None}, {"unshippable": "built for the comparison"}):  # nothing that is shipped is left out
        engine = variant("tensorrt int8", status="not here", reason="needs an NVIDIA GPU", points=[], **other)
        assert "was excluded" not in choose_variant(comparison(variant("openvino int8", 2.0), engine), Budgets())["why"]


def test_without_the_baseline_nothing_is_decided():
    found = comparison(variant("openvino int8", 2.0))
    found.variants[0].status, found.variants[0].reason = "out of time", "too slow"
    decision = choose_variant(found, Budgets())
    assert decision["ship"] is None
    assert (
        "onnxruntime fp32, which all others are held against, wasn't measured: out of time: too slow" in decision["why"]
    )
    del found.variants[0]
    assert "it is not among the variants" in choose_variant(found, Budgets())["why"]


def test_agreement_stands_in_for_accuracy_and_that_is_said():
    variants = [variant("openvino int8", 2.0, accuracy=None)]
    found = comparison(*variants)
    found.variants[0].accuracy, found.variants[0].agreement, variants[0].agreement = None, 0.97, 0.98
    assert "its agreement (there are no labels) is 1.00 points higher" in choose_variant(found, Budgets())["why"]
    variants[0].agreement = 0.95
    assert choose_variant(found, Budgets(max_drop=1))["refused"]["openvino int8"].startswith(
        "agreement drops by 2.00 points"
    )


def test_too_few_samples_are_said():
    assert resolution(16, {"max_drop": 0.5}).startswith("One of the 16 samples weighs 6.25 points")
    assert resolution(200, {"max_drop": 0.5}) == resolution(None, {"max_drop": 0.5}) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": -0.1}, "Argument `max_drop` must be from 0 to 100 percentage points, but got -0.1"),
        ({"max_drop": float("nan")}, "Argument `max_drop` must be from 0 to 100 percentage points, but got nan"),
        ({"max_bytes": 0}, "Argument `max_bytes` must be above 0 and finite, or None, but got 0"),
        ({"max_latency_ms": -1.0}, "Argument `max_latency_ms` must be above 0 and finite, or None"),
        (
            {"max_latency_ms": float("inf")},
            "Argument `max_latency_ms` must be above 0 and finite, or None, but got inf",
        ),
        ({"batch": 0}, "Argument `batch` must be above 0"),
    ],
)
def test_bad_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budgets(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": ()}, r"Argument `batches` must hold integers of at least 1, but got \(\)"),
        ({"batches": (1, 1)}, "Argument `batches` must hold each number once"),
        ({"callers": (2,)}, "Argument `callers` must hold 1"),
        ({"seconds": 0.0}, "Argument `seconds` must be above 0"),
        ({"limit_s": float("nan")}, "Argument `limit_s` must be above 0 and finite, but got nan"),
        ({"warmup_s": -1.0}, "Argument `warmup_s` must be at least 0"),
        ({"min_rounds": 1}, "Argument `min_rounds` must be at least 2"),
        ({"threads": 0}, "Argument `threads` must be at least 1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**arguments)


def test_text_and_json_hold_all_of_it():
    lost = VariantResult("tensorrt int8", "tensorrt", "int8", status="not here", reason="needs a GPU")
    found = comparison(variant("openvino int8", 2.0), lost)
    found.decision = choose_variant(found, Budgets(max_drop=0.05))
    text = render_comparison(found)
    assert "| openvino int8    |  90.00 % |   90.00 % |       1,000 |" in text
    assert (
        "| openvino int8    |    32 |       1 |  32.000 |  32.000 |  32.000 |     1,000 | 2.00x [2.00, 2.00] |" in text
    )
    assert "- tensorrt int8: not here: needs a GPU" in text
    assert "null run, batch 32, 1 caller: 1.000x [0.990, 1.010]" in text
    assert "Decision (max_drop 0.05, batch 32): openvino int8 ships: 2.00x" in text
    assert "One of the 1000 samples weighs 0.10 points" in text
    again = Comparison.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.variants == found.variants
    assert again.decision == found.decision
    assert again["openvino int8"].point(32).speedup == 2.0
    with pytest.raises(KeyError, match="No variant 'x'"):
        again["x"]
    with pytest.raises(ValueError, match="The comparison must have schema 1, but got 2"):
        Comparison.from_dict({**found.to_dict(), "schema": 2})


def test_values_are_told_by_their_r_squared():
    found = comparison(variant("openvino int8", 2.0, accuracy=0.893))
    found.settings["output_kind"] = "values"
    decision = choose_variant(found, Budgets(max_drop=0.5))
    assert decision["refused"]["openvino int8"] == "R² drops by 0.70 points, more than 0.5"
    found.decision = choose_variant(found, Budgets(max_drop=0.75))
    assert "its R² drops by 0.70 points on 1,000 samples" in found.decision["why"]
    text = render_comparison(found)
    assert "R² of outputs" in text.splitlines()[0]
    assert "accuracy" not in text
    assert resolution(16, {"max_drop": 0.5}, "values") == ""
