"""OpenVINO GenAI: reads the GGUF file and converts it while loading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_accel.core.optional import require
from lightning_accel.language_models.engines.base import OnToken, TextEngine


class OpenVinoGenaiEngine(TextEngine):
    """A GGUF file with quantized blocks. Adapters over a GGUF file are ignored by the runtime, so none are taken here."""

    name = "openvino-genai"

    def __init__(self, path: str | Path, *, threads: int = 1, context: int = 512) -> None:
        super().__init__(path, threads=threads, context=context)
        self._genai = require("openvino_genai", "lm-engines", "Engine `openvino-genai`")
        self._openvino = require("openvino", "openvino", "Engine `openvino-genai`")
        self._pipeline: Any = self._genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    @override
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        self.check_context(prompt, new_tokens)
        settings = self._genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = new_tokens, False, True
        ids = self._openvino.Tensor(np.array([list(prompt)], dtype=np.int64))
        streamer = None if on_token is None else self._streamer(on_token)
        found = self._pipeline.generate(ids, settings, streamer)
        return [int(token) for token in found.tokens[0]]

    def _streamer(self, on_token: OnToken) -> Any:
        genai = self._genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]  # of an optional package
            """Hands tokens on as they appear."""

            def write(self, token: Any) -> Any:
                """Take a token, or a list of them."""
                for one in [token] if isinstance(token, int) else token:
                    on_token(int(one))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Nothing to do."""

        return Streamer()

    @override
    def close(self) -> None:
        self._pipeline = None
