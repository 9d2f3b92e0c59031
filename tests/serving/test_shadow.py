"""A share of the answers is compared with the float32 reference, and what leaves it more than on held-out data is told."""

import asyncio
import subprocess

import numpy as np
import pytest

from lightning_accel.engines.manifest import read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.shadow import LEAST, Expected, Shadow
from tests.serving.conftest import command, serving


def test_inputs_unlike_those_of_the_calibration_raise_the_alarm(bundles):
    rng = np.random.default_rng(0)
    proofs = read_manifest(bundles["int8"])["proofs"]
    assert proofs["same_as_float"]["of"] == 32
    assert set(proofs["signal_to_noise_db"]) == set(read_manifest(bundles["int8"])["outputs"])
    with serving(f"m={bundles['int8']}", "--engine", "onnxruntime", "--shadow", 100, "--max-batch", 64) as server:
        shadow = "lightning_accel_shadow_predictions_total"
        for _ in range(5):  # one after the other: what waits beside eight others is left out
            before = server.metric(f'{shadow}{{model="m",outcome="same"}}')
            assert server.infer("m", rng.standard_normal((40, 4)).astype(np.float32)).status_code == 200
            server.wait_until(lambda seen=before: server.metric(f'{shadow}{{model="m",outcome="same"}}') > seen)
        assert server.metric('lightning_accel_shadow_alarm{model="m"}') == 0
        low, high = read_manifest(bundles["int8"])["input_ranges"]["x"]
        assert -5 < low < -1 < 1 < high < 5
        few = server.metric('lightning_accel_input_rows_outside_total{input="x",model="m"}')
        assert server.metric('lightning_accel_input_rows_total{input="x",model="m"}') == 200
        assert few < 100
        for _ in range(40):
            x = (rng.standard_normal((40, 4)) * [300, 100, 30, 10] + [0, 0, 100, -100]).astype(np.float32)
            before = server.metric(f'{shadow}{{model="m",outcome="other"}}')
            assert server.infer("m", x).status_code == 200
            server.wait_until(lambda seen=before: server.metric(f'{shadow}{{model="m",outcome="other"}}') > seen)
            if server.metric('lightning_accel_shadow_alarm{model="m"}') == 1:
                break
        assert server.metric('lightning_accel_shadow_alarm{model="m"}') == 1
        assert server.metric('lightning_accel_input_rows_outside_total{input="x",model="m"}') > few + 40
        server.process.terminate()
        assert "Model `m` leaves its float32 reference more than on held-out data" in server.process.stdout.read()
        assert server.process.wait(30) == 0


class Reference:
    """The shadow's workers, as far as it uses them."""

    class settings:  # noqa: N801
        stall_s = 1.0

    def __init__(self, outputs):
        self.outputs = outputs

    async def infer(self, feeds, rows, timeout_s):
        return self

    async def close(self):
        return None


def shadowed(expected, pairs, share=1.0):
    """Events of a shadow that sees these answers and those of the reference."""
    events = []

    async def run():
        shadow = Shadow(share, Reference({}), expected, lambda kind, count: events.append((kind, count)))
        for answer, exact in pairs:
            shadow.pool.outputs = {"y": exact}
            shadow.offer({}, len(answer), {"y": answer})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await shadow.close()

    asyncio.run(run())
    return events


def test_values_are_held_against_the_signal_to_noise_ratio_of_the_bundle():
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((4, 1)).astype(np.float32) for _ in range(2 * LEAST)]
    quiet = [(y + 0.1 * rng.standard_normal(y.shape), y) for y in exact]  # 20 dB
    assert ("alarm", 1) not in shadowed(Expected(None, 0, 20.0), quiet)
    assert ("alarm", 1) in shadowed(Expected(None, 0, 24.0), quiet)
    assert ("alarm", 1) not in shadowed(Expected(None, 0, 24.0), quiet[: LEAST - 1])


def test_predictions_are_held_against_both_intervals():
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((1, 3)) for _ in range(400)]
    wrong = [(np.roll(y, 1, axis=1) if i % 20 == 0 else y, y) for i, y in enumerate(exact)]  # 95 % are the same
    assert ("alarm", 1) not in shadowed(Expected(95, 100, 0.0), wrong)
    assert ("alarm", 1) in shadowed(Expected(1000, 1000, 0.0), wrong)
    events = shadowed(Expected(1000, 1000, 0.0), [*wrong, *[(y, y) for y in exact] * 3])
    assert [event for event in events if event[0] == "alarm"][-1] == ("alarm", 0)  # the window forgets
    half = shadowed(Expected(95, 100, 0.0), wrong, share=0.25)
    assert sum(count for kind, count in half if kind in ("same", "other")) == 100


def test_a_bundle_without_a_reference_and_shares_that_are_none(bundles):
    with pytest.raises(InvalidArgumentError, match="must be of a bundle with int8 and its float32 reference"):
        Expected.of_bundle(read_manifest(bundles["pixels"]))
    ended = subprocess.run(command(bundles["int8"], "--shadow", 101), capture_output=True, text=True)
    assert ended.returncode == 1
    assert "from 0 to 100 percent" in ended.stderr
