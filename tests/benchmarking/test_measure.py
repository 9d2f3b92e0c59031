import gc
import itertools
import json
import time

import numpy as np
import pytest

from lightning_accel.benchmarking.measure import benchmark, environment, median_ratio


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_ratios_are_those_of_the_work():
    variants = {"one": lambda: spin(1e-3), "two": lambda: spin(2e-3), "half": lambda: spin(0.5e-3)}
    result = benchmark(variants, rounds=60, warmup_s=0.01)
    assert [measurement.name for measurement in result.measurements] == ["one", "two", "half"]
    assert result.baseline == "one"
    assert result.rounds == 60
    assert (result["one"].speedup.value, result["one"].speedup.low, result["one"].speedup.high) == (1, 1, 1)
    assert result["two"].speedup.value == pytest.approx(0.5, rel=0.2)  # slower is reported as slower
    assert result["half"].speedup.value == pytest.approx(2.0, rel=0.2)
    assert result.null.value == pytest.approx(1.0, rel=0.2)
    for measurement in result.measurements:
        assert len(measurement.samples) == 60
        assert measurement.p50_ms == np.percentile(measurement.samples, 50)
        assert measurement.p90_ms == np.percentile(measurement.samples, 90)
        assert measurement.speedup.low <= measurement.speedup.value <= measurement.speedup.high


def test_every_round_calls_every_variant_once_in_shuffled_order():
    order = []
    benchmark({name: lambda name=name: order.append(name) for name in "abc"}, rounds=30, warmup_s=0, seed=1)
    assert order[:3] == ["a", "b", "c"]  # warm-up of no length: one call each
    rounds = [tuple(order[start : start + 4]) for start in range(3, len(order), 4)]
    assert len(rounds) == 30
    assert all(sorted(one) == ["a", "a", "b", "c"] for one in rounds)  # the baseline runs twice: A/A
    assert len(set(rounds)) > 6


def test_order_follows_the_seed():
    def orders(seed):
        order = []
        benchmark({name: lambda name=name: order.append(name) for name in "abc"}, rounds=20, warmup_s=0, seed=seed)
        return order

    assert orders(0) == orders(0) != orders(1)


def test_baseline_by_name():
    result = benchmark({"slow": lambda: spin(2e-3), "fast": lambda: spin(1e-3)}, baseline="fast", rounds=40, warmup_s=0)
    assert result["fast"].speedup.value == 1
    assert 0.2 < result["slow"].speedup.value < 0.8  # 0.5, but for what else runs on this machine


def test_time_limit_holds_after_the_least_number_of_rounds():
    result = benchmark({"a": lambda: spin(1e-3)}, rounds=10_000, min_rounds=7, max_seconds=0, warmup_s=0)
    assert result.rounds == 7


def test_a_machine_that_is_not_quiet_is_called_noisy():
    calls = itertools.count()
    # Every second call is 30 times slower: which of the two runs of a round it hits is left to the shuffling.
    result = benchmark({"a": lambda: spin((1e-4, 3e-3)[next(calls) % 2])}, rounds=8, min_rounds=8, warmup_s=0)
    assert result.null.low < 0.9
    assert result.null.high > 1.1
    assert result.noisy is True


def test_noisy_is_what_the_null_interval_says():
    result = benchmark({"a": lambda: spin(1e-3)}, rounds=40, warmup_s=0)
    assert result.noisy == (result.null.low < 0.9 or result.null.high > 1.1)


def test_garbage_collection_is_off_inside_and_restored():
    states = []
    benchmark({"a": lambda: states.append(gc.isenabled())}, rounds=2, min_rounds=2, warmup_s=0)
    assert states == [True, *[False] * 4]
    assert gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise KeyError("variant")

    with pytest.raises(KeyError, match="variant"):
        benchmark({"a": fail}, warmup_s=0)
    assert gc.isenabled()


def test_median_ratio_is_paired_and_its_interval_covers():
    # Unpaired, a drift of factor 100 would drown a ratio of 1.25.
    drift = np.geomspace(1, 100, 50)
    exact = median_ratio(1.25 * drift, drift, np.random.default_rng(0))
    assert (exact.value, exact.low, exact.high) == pytest.approx((1.25, 1.25, 1.25))

    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):  # the median of a lognormal ratio is exp(mean) = 1
        noise = np.exp(rng.normal(0, 0.2, size=50))
        ratio = median_ratio(noise, np.ones(50), rng)
        covered += ratio.low <= 1 <= ratio.high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": {}}, "Argument `variants` must have at least one variant"),
        ({"baseline": "b"}, r"Argument `baseline` must be one of \['a'\], but got 'b'"),
        ({"min_rounds": 1}, r"Argument `min_rounds` must be from 2 to `rounds` \(200\), but got 1"),
        ({"rounds": 5}, r"from 2 to `rounds` \(5\), but got 20"),
        ({"warmup_s": -1.0}, "Argument `warmup_s` must be at least 0"),
        ({"max_seconds": float("nan")}, "Argument `max_seconds` must be at least 0, but got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark(**{"variants": {"a": lambda: None}, **arguments})


def test_result_is_json_and_finds_variants_by_name():
    result = benchmark({"a": lambda: spin(1e-4), "b": lambda: spin(1e-4)}, rounds=3, min_rounds=3, warmup_s=0)
    values = json.loads(json.dumps(result.to_dict()))
    assert [one["name"] for one in values["measurements"]] == ["a", "b"]
    assert values["null"].keys() == {"value", "low", "high"}
    assert values["environment"] == json.loads(json.dumps(result.environment))
    assert json.loads(json.dumps(result["b"].to_dict()))["samples"] == result["b"].samples
    with pytest.raises(KeyError, match="No variant 'c'"):
        result["c"]


def test_environment_names_machine_and_versions():
    found = environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__
    assert set(found["cpu_flags"]) >= {"avx2", "avx512_vnni", "avx_vnni"}
    assert json.loads(json.dumps(found)) == found
