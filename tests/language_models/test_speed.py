import subprocess
import sys
import time

import pytest

from lightning_accel.errors import EngineError, InvalidArgumentError
from lightning_accel.language_models import speed
from lightning_accel.language_models.engines.base import TextEngine
from lightning_accel.language_models.speed import benchmark_language_bundle, measure_engine, render_speed


class Slow(TextEngine):
    """An engine of known speed: 20 ms for a prompt, 2 ms for each further token."""

    name = "slow"

    def __init__(self):
        super().__init__("none")

    def generate(self, prompt, new_tokens, on_token=None):
        time.sleep(0.02 + 0.002 * (new_tokens - 1))
        return [5] * new_tokens


def test_times_are_those_of_the_engine():
    found = measure_engine(Slow(), 100, prompt_tokens=4, new_tokens=11, callers=(1, 3), seconds=0.05)
    assert found["first_token_ms"] == pytest.approx(20, rel=0.5)
    # one after the other: three callers get the same number of tokens per second as one
    assert 250 < found["tokens_per_s"]["1"] < 520
    assert 250 < found["tokens_per_s"]["3"] < 520


def test_wrong_settings_are_refused(tmp_path, monkeypatch):
    manifest = {"engines": {}, "context": 32}
    monkeypatch.setattr(speed, "read_language_manifest", lambda bundle: manifest)
    with pytest.raises(InvalidArgumentError, match=r"must fit into the context of 32 tokens, but got 32 \+ 32"):
        benchmark_language_bundle(tmp_path)
    with pytest.raises(InvalidArgumentError, match="must be at least 2 and 1"):
        benchmark_language_bundle(tmp_path, new_tokens=1)
    with pytest.raises(EngineError, match=r"must end within 0\.01 s"):
        speed._in_process({"engine": "x"}, 0.01)


def test_an_engine_that_fails_is_listed_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(
        speed, "read_language_manifest", lambda bundle: {"engines": {"gone": {"perplexity": None}}, "context": 99}
    )
    monkeypatch.setattr(speed.sys, "executable", "/bin/false")
    found = benchmark_language_bundle(tmp_path)
    assert "must run in its own process, but failed: " in found["failed"]["gone"]
    assert "gone: Engine `gone` must run" in render_speed(found)


def test_engines_are_measured_without_torch():
    code = (
        "import sys, lightning_accel.language_models.speed; print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
