"""Runs vLLM in an interpreter of its own: JSON requests on standard input, JSON answers on standard output.

A script, started by :mod:`lightning_accel.language_models.engines.vllm`; it imports vLLM and nothing of this library.
"""

import json
import os
import sys
from typing import Any

MARK = "\x1elightning-accel "  # vLLM writes to standard output, too


def serve(settings: dict[str, Any]) -> None:
    """Load the model, then answer requests until standard input ends."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]  # of another interpreter

    adapter = settings.pop("adapter", None)
    model = LLM(disable_log_stats=True, enforce_eager=True, **settings)
    request = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

        request = LoRARequest("adapter", 1, adapter)

    def run(prompts: list[list[int]], **parameters: Any) -> Any:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = SamplingParams(temperature=0, ignore_eos=True, **parameters)
        return model.generate(inputs, sampling, use_tqdm=False, lora_request=request)

    answer({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "generate":
            found = run(asked["prompts"], max_tokens=asked["new_tokens"])
            answer({"tokens": [list(one.outputs[0].token_ids) for one in found]})
        elif asked["do"] == "score":
            (one,) = run([asked["tokens"]], max_tokens=1, prompt_logprobs=0)
            values = [entry[token].logprob for entry, token in zip(one.prompt_logprobs[1:], asked["tokens"][1:])]  # noqa: B905
            answer({"log_probabilities": values})
        else:
            (one,) = run([asked["tokens"]], max_tokens=1, logprobs=asked["count"])
            answer({"top": {str(token): entry.logprob for token, entry in one.outputs[0].logprobs[0].items()}})


def answer(value: dict[str, Any]) -> None:
    """Write an answer."""
    print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        serve(json.loads(sys.argv[1]))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
