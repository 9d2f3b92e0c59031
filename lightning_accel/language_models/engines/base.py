"""The interface of text engines: token ids in, token ids out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import numpy as np

from lightning_accel.errors import InvalidArgumentError

OnToken = Callable[[int], None]


class TextEngine(ABC):
    """One file in one runtime.

    Args:
        path: folder or file, as the runtime takes it.
        threads: CPU threads.
        context: largest number of tokens of prompt and answer together.

    Attributes:
        name: of the engine.
        callers: how many requests run at the same time; with 1 they follow each other.
    """

    name: ClassVar[str]
    callers: ClassVar[int] = 1

    def __init__(self, path: str | Path, *, threads: int = 1, context: int = 512) -> None:
        self.path, self.threads, self.context = Path(path), threads, context

    @abstractmethod
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        """Greedy continuation of a prompt.

        Args:
            prompt: token ids.
            new_tokens: exactly so many tokens; the end-of-text token doesn't end it.
            on_token: called with each token as it appears.
        """

    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continuations of several prompts, at the same time where the engine can."""
        if self.callers == 1:
            return [self.generate(prompt, new_tokens) for prompt in prompts]
        with ThreadPoolExecutor(self.callers) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, new_tokens), prompts))

    def logits(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Logits ``(T, V)`` of all positions in float32; ``None`` if the engine doesn't return them."""
        return None

    def token_log_probabilities(self, tokens: Sequence[int]) -> list[float] | None:
        """Log-probability of each token but the first, given those before it; ``None`` if the engine doesn't return them."""
        found = self.logits(tokens)
        if found is None:
            return None
        values = log_softmax(found[:-1])
        return [float(values[i, token]) for i, token in enumerate(tokens[1:])]

    def next_log_probabilities(self, tokens: Sequence[int], count: int) -> dict[int, float] | None:
        """Log-probabilities of the ``count`` most probable next tokens; ``None`` if the engine doesn't return them."""
        found = self.logits(tokens)
        if found is None:
            return None
        values = log_softmax(found[-1])
        return {int(i): float(values[i]) for i in np.argsort(values)[::-1][:count]}

    def check_context(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Raise if a prompt and its answer don't fit into the context.

        Raises:
            InvalidArgumentError: they don't, or the prompt is empty.
        """
        if not len(prompt):
            raise InvalidArgumentError("Argument `prompt` must have a token, but got none.")
        if len(prompt) + new_tokens > self.context:
            raise InvalidArgumentError(
                f"Argument `prompt` must leave room for {new_tokens} new tokens in the context of {self.context}, but got {len(prompt)} "
                "tokens. Shorten it, or ask for fewer."
            )

    def close(self) -> None:  # noqa: B027  # most runtimes end with the object
        """Free the runtime."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, in float64."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    result: np.ndarray = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result
