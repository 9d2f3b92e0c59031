"""llama.cpp through xllamacpp: a GGUF file, served over HTTP on this machine."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_accel.core.optional import require
from lightning_accel.errors import EngineError
from lightning_accel.language_models.engines.base import OnToken, TextEngine

_WHOLE = 8192  # largest vocabulary whose log-probabilities are asked for whole, token by token


class LlamaCppEngine(TextEngine):
    """llama.cpp's server in this process, with continuous batching for up to 8 requests.

    Args:
        path: GGUF file.
        threads: CPU threads.
        context: tokens of prompt and answer, of each request.
        cache: type of the KV cache: ``"f16"`` or ``"q8_0"``.
    """

    name = "llama.cpp"
    callers = 8

    def __init__(self, path: str | Path, *, threads: int = 1, context: int = 512, cache: str = "f16") -> None:
        super().__init__(path, threads=threads, context=context)
        llama = require("xllamacpp", "lm-engines", "Engine `llama.cpp`")
        settings = llama.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = context * self.callers, self.callers
        settings.kv_unified = False
        settings.warmup, settings.n_gpu_layers = False, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.hostnames, settings.port = ["127.0.0.1"], 0
        if cache != "f16":
            kind = llama.ggml_type.GGML_TYPE_Q8_0
            settings.cache_type_k = settings.cache_type_v = kind
        self._server: Any = llama.Server(settings)

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=600)

    def _body(self, prompt: Sequence[int], new_tokens: int, **more: Any) -> dict[str, Any]:
        settings = {
            "temperature": 0,
            "top_k": 1,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return {"prompt": list(prompt), "n_predict": new_tokens, "return_tokens": True, **settings, **more}

    @override
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        self.check_context(prompt, new_tokens)
        if on_token is None:
            return self._continue(prompt, new_tokens)
        answer: list[int] = []
        for _ in range(new_tokens):  # the server's stream leaves out tokens that are a part of a character
            answer += self._continue([*prompt, *answer], 1, cache_prompt=True)
            on_token(answer[-1])
        return answer

    def _continue(self, prompt: Sequence[int], new_tokens: int, **more: Any) -> list[int]:
        with self._post("/completion", self._body(prompt, new_tokens, **more)) as answer:
            found = json.load(answer)
        if len(found.get("tokens", ())) != new_tokens:
            raise EngineError(
                f"llama.cpp must return {new_tokens} tokens, but got {len(found.get('tokens', ()))}: {found.get('stop_type', found)}."
            )
        return [int(token) for token in found["tokens"]]

    @override
    def next_log_probabilities(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        # The server leaves the probabilities out if the sampled token is a part of a character: sample a whole one. They are of the
        # logits before this bias.
        bias = [[self.encode("a")[0], 1e4]]
        body = self._body(tokens, 1, n_probs=count, cache_prompt=True, logit_bias=bias)
        with self._post("/completion", body) as answer:
            (first, *_) = json.load(answer)["completion_probabilities"]
        return {int(e["id"]): float(e["logprob"]) for e in first["top_logprobs"]}

    @override
    def token_log_probabilities(self, tokens: Sequence[int]) -> list[float] | None:
        with urllib.request.urlopen(self._server.listening_address + "/v1/models", timeout=60) as answer:
            size = int(json.load(answer)["data"][0]["meta"]["n_vocab"])
        if size > _WHOLE:
            return None  # the server returns the most probable tokens, not that of a given one
        return [self.next_log_probabilities(tokens[:i], size)[int(tokens[i])] for i in range(1, len(tokens))]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by the tokenizer in the file."""
        with self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True}) as answer:
            return [int(token) for token in json.load(answer)["tokens"]]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat by the template in the file, with the header of the answer."""
        with self._post("/apply-template", {"messages": list(messages)}) as answer:
            return str(json.load(answer)["prompt"])

    @override
    def close(self) -> None:
        self._server = None
