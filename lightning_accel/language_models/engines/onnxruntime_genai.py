"""onnxruntime-genai: ONNX with a KV cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_accel.core.optional import require
from lightning_accel.language_models.engines.base import OnToken, TextEngine


class OnnxRuntimeGenaiEngine(TextEngine):
    """A folder that the model builder of onnxruntime-genai wrote."""

    name = "onnxruntime-genai"

    def __init__(self, path: str | Path, *, threads: int = 1, context: int = 512) -> None:
        super().__init__(path, threads=threads, context=context)
        self._genai = require("onnxruntime_genai", "lm", "Engine `onnxruntime-genai`")
        config = self._genai.Config(str(path))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay('{"model": {"decoder": ' + str(options).replace("'", '"') + "}}")
        self._model: Any = self._genai.Model(config)

    def _generator(self, prompts: Sequence[Sequence[int]], length: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        return generator

    @override
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        generator = self._generator([tokens], len(tokens) + 1)
        found = np.array(generator.get_output("logits"), dtype=np.float32)
        return found.reshape(-1, found.shape[-1])

    @override
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        self.check_context(prompt, new_tokens)
        generator = self._generator([prompt], len(prompt) + new_tokens)
        answer: list[int] = []
        while len(answer) < new_tokens:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
            if on_token is not None:
                on_token(answer[-1])
        return answer

    @override
    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        if len({len(p) for p in prompts}) > 1:  # padding would be the tokenizer's, and change the result
            return super().generate_all(prompts, new_tokens)
        generator = self._generator(prompts, len(prompts[0]) + new_tokens)
        for _ in range(new_tokens):
            generator.generate_next_token()
        return [[int(t) for t in generator.get_sequence(i)[len(prompts[0]) :]] for i in range(len(prompts))]

    @override
    def close(self) -> None:
        self._model = None
