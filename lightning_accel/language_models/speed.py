"""Speed of the proven engines of a language model's bundle: time to first token, tokens per second, memory."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_accel.benchmarking.environment import environment
from lightning_accel.errors import EngineError, InvalidArgumentError
from lightning_accel.language_models.engines.base import TextEngine
from lightning_accel.language_models.opening import open_bundle, read_language_manifest

_MARK = "lightning-accel speed: "
_NULL = "(again)"


@dataclass
class Speed:
    """Speed of one engine in a process of its own.

    Attributes:
        engine: name; with "(again)" the null run: the first engine once more, which shows the error of this measurement.
        first_token_ms: median time from a prompt to its first token, in ms.
        tokens_per_s: number of callers -> new tokens per second of all callers together, without the first of each.
        memory_mb: peak resident memory of the process, in MB; of vLLM without its own process.
        rounds: measurements behind each median.
        perplexity: of held-out tokens through this engine, as proven when the bundle was written; ``None`` if it doesn't return it.
    """

    engine: str
    first_token_ms: float
    tokens_per_s: dict[str, float]
    memory_mb: float
    rounds: int
    perplexity: float | None


def measure_engine(
    engine: TextEngine, vocabulary: int, *, prompt_tokens: int, new_tokens: int, callers: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Measure an engine in this process.

    Args:
        engine: loaded.
        vocabulary: of its tokens.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens of an answer.
        callers: numbers of prompts at once.
        seconds: time for each number of callers.
    """
    prompts = [[2 + (7 * i + 3 * k) % (vocabulary - 2) for i in range(prompt_tokens)] for k in range(max(callers))]
    engine.generate(prompts[0], new_tokens)  # warm-up
    first = [_seconds(partial(engine.generate, prompts[0], 1)) for _ in range(5)]
    rates: dict[str, float] = {}
    rounds = 0
    for count in callers:
        chosen, begun = prompts[:count], time.perf_counter()
        found: list[float] = []
        while len(found) < 3 or time.perf_counter() - begun < seconds:
            start = _seconds(partial(engine.generate_all, chosen, 1))
            whole = _seconds(partial(engine.generate_all, chosen, new_tokens))
            found.append(count * (new_tokens - 1) / max(whole - start, 1e-9))
        rates[str(count)] = statistics.median(found)
        rounds = len(found) if not rounds else min(rounds, len(found))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {
        "first_token_ms": 1000 * statistics.median(first),
        "tokens_per_s": rates,
        "memory_mb": memory,
        "rounds": rounds,
    }


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def benchmark_language_bundle(
    bundle: str | Path,
    *,
    callers: Sequence[int] = (1, 8),
    seconds: float = 2.0,
    threads: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    limit: float = 300.0,
) -> dict[str, Any]:
    """Measure all proven engines of a bundle, each in a process of its own, and the first one twice.

    Args:
        bundle: folder.
        callers: numbers of prompts at once.
        seconds: time for each engine and number of callers.
        threads: CPU threads of each engine.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens of an answer, at least 2.
        limit: seconds after which an engine is given up.

    Returns:
        ``engines``: a list of :class:`Speed` as dicts; ``failed``: name -> reason; ``null``: ratio of the null run's tokens per
        second to the first run's, by callers; ``fastest``: engine by callers; ``environment``.

    Raises:
        InvalidArgumentError: a file of the bundle changed, prompts don't fit into the context, or numbers are out of their range.
    """
    manifest = read_language_manifest(bundle)
    if new_tokens < 2 or min(callers) < 1:
        raise InvalidArgumentError(
            f"Arguments `new_tokens` and `callers` must be at least 2 and 1, but got {new_tokens} and {list(callers)}."
        )
    if prompt_tokens + new_tokens > manifest["context"]:
        raise InvalidArgumentError(
            f"Arguments `prompt_tokens` and `new_tokens` must fit into the context of {manifest['context']} tokens, but got "
            f"{prompt_tokens} + {new_tokens}."
        )
    names = list(manifest["engines"])
    settings = {
        "bundle": str(Path(bundle).resolve()),
        "callers": list(callers),
        "seconds": seconds,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    found: list[Speed] = []
    failed: dict[str, str] = {}
    for name in [*names, *(f"{first} {_NULL}" for first in names[:1])]:
        if name.removesuffix(f" {_NULL}") in failed:
            continue
        try:
            values = _in_process({**settings, "engine": name.removesuffix(f" {_NULL}")}, limit)
        except EngineError as error:
            failed[name] = str(error)
            continue
        perplexity = manifest["engines"][name.removesuffix(f" {_NULL}")]["perplexity"]
        found.append(Speed(engine=name, perplexity=perplexity, **values))
    ranked = [one for one in found if not one.engine.endswith(_NULL)]
    null = next((one for one in found if one.engine.endswith(_NULL)), None)
    return {
        "engines": [asdict(one) for one in found],
        "failed": failed,
        "null": {} if null is None or not ranked else _ratio(null, ranked[0]),
        "fastest": {
            str(count): max(ranked, key=lambda one: one.tokens_per_s[str(count)]).engine for count in callers if ranked
        },
        "settings": {key: value for key, value in settings.items() if key != "bundle"},
        "environment": environment(),
    }


def _ratio(again: Speed, first: Speed) -> dict[str, float]:
    return {count: again.tokens_per_s[count] / rate for count, rate in first.tokens_per_s.items()}


def _in_process(settings: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Measure in a new process.

    Raises:
        EngineError: it failed, or took too long.
    """
    command = [sys.executable, "-m", "lightning_accel.language_models.speed", json.dumps(dict(settings))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        raise EngineError(f"Engine `{settings['engine']}` must end within {limit:g} s, but ran longer.") from None
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            values: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return values
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise EngineError(f"Engine `{settings['engine']}` must run in its own process, but failed: {last}")


def render_speed(found: Mapping[str, Any]) -> str:
    """The measurements as a table in Markdown, with the fastest engines below."""
    callers = found["settings"]["callers"]
    rates = [f"tokens/s, {count} at once" for count in callers]
    head = ["engine", "first token, ms", *rates, "memory, MB", "perplexity"]
    rows = [
        [
            one["engine"],
            f"{one['first_token_ms']:.1f}",
            *(f"{one['tokens_per_s'][str(count)]:.0f}" for count in callers),
            f"{one['memory_mb']:.0f}",
            "" if one["perplexity"] is None else f"{one['perplexity']:.3f}",
        ]
        for one in found["engines"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] + ["--:"] * (len(head) - 1), *rows]]
    fastest = [f"{engine} for {count} at once" for count, engine in found["fastest"].items()]
    lines += ["", f"Fastest of the proven engines: {', '.join(fastest)}."] if fastest else []
    lines += [f"{name}: {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines)


def _main(settings: dict[str, Any]) -> None:
    bundle, name, threads = settings.pop("bundle"), settings.pop("engine"), settings.pop("threads")
    context = settings["prompt_tokens"] + settings["new_tokens"]
    vocabulary = int(read_language_manifest(bundle)["vocabulary"])
    with open_bundle(bundle, name, threads=threads, context=context) as engine:
        values = measure_engine(engine, vocabulary, **settings)
    print(_MARK + json.dumps(values), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
