"""transformers: the folder in compressed-tensors, computed in float32."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_accel.core.optional import require
from lightning_accel.language_models.engines.base import OnToken, TextEngine


class TransformersEngine(TextEngine):
    """A folder of transformers.

    Args:
        path: folder.
        threads: ignored: PyTorch's own setting holds.
        context: tokens of prompt and answer.
        adapter: folder of an adapter in the format of peft.
    """

    name = "transformers"

    def __init__(
        self, path: str | Path, *, threads: int = 1, context: int = 512, adapter: str | Path | None = None
    ) -> None:
        super().__init__(path, threads=threads, context=context)
        transformers = require("transformers", "lm", "Engine `transformers`")
        torch = require("torch", "lm", "Engine `transformers`")
        require("compressed_tensors", "lm", "Engine `transformers`")
        with warnings.catch_warnings(), without_progress(transformers):
            # The argument asks for float kernels of the file's own integers.
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            settings = transformers.CompressedTensorsConfig(dequantize=True)
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=torch.float32, quantization_config=settings
            ).eval()
        if adapter is not None:
            peft = require("peft", "lm", "An adapter")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                self._model = peft.PeftModel.from_pretrained(self._model, str(adapter)).eval()
        self._torch = torch

    @override
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with self._torch.no_grad():
            result: np.ndarray = self._model(self._torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
        return result

    @override
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        self.check_context(prompt, new_tokens)
        ids, cache, answer = self._torch.tensor([list(prompt)]), None, []
        for _ in range(new_tokens):
            with self._torch.no_grad():
                out = self._model(ids, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            answer.append(token)
            if on_token is not None:
                on_token(token)
            ids = self._torch.tensor([[token]])
        return answer

    @override
    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        torch, longest = self._torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = self._model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **settings)
        return [row[longest:].tolist() for row in out]


@contextmanager
def without_progress(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers in the block."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
