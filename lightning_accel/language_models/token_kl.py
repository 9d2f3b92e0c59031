"""Distillation of next-token distributions (https://arxiv.org/abs/1503.02531; reverse KL: https://arxiv.org/abs/2306.08543)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accel.distillation.cache.fingerprint import of_teacher
from lightning_accel.distillation.cache.teacher_cache import TeacherCache
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.loading import load_causal_lm, vocabulary_size
from lightning_accel.language_models.token_cache import TokenCache

DIRECTIONS = ("forward", "reverse")


def token_kl(student: Tensor, teacher: Tensor, direction: str = "forward", temperature: float = 1.0) -> Tensor:
    """Divergence of next-token distributions, summed over tokens, in nats.

    Args:
        student: logits ``(P, V)``.
        teacher: logits ``(P, V)``.
        direction: ``"forward"``: ``KL(teacher ‖ student)``; ``"reverse"``: ``KL(student ‖ teacher)``.
        temperature: divides both; the result is multiplied by its square, which keeps the size of gradients.

    Returns:
        Scalar, float32.

    Example:
        >>> token_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986123]])).item()  # 0.25 and 0.75 against 0.5 and 0.5
        0.1308...
    """
    s = F.log_softmax(student.float() / temperature, -1)
    t = F.log_softmax(teacher.float() / temperature, -1)
    first, second = (t, s) if direction == "forward" else (s, t)
    return F.kl_div(second, first, reduction="sum", log_target=True) * temperature**2


def top_k_kl(
    student: Tensor, values: Tensor, classes: Tensor, rest: Tensor, direction: str = "forward", temperature: float = 1.0
) -> Tensor:
    """:func:`token_kl` of distributions over the teacher's k most probable tokens and one event for all others.

    Args:
        student: logits ``(P, V)``.
        values: the teacher's largest logits divided by the temperature, ``(P, k)``.
        classes: their tokens, ``(P, k)``.
        rest: logarithm of the sum of ``exp`` of all other logits divided by the temperature, ``(P,)``.
        direction: see :func:`token_kl`.
        temperature: divides the student's logits.

    Returns:
        Scalar, float32: at most the divergence of the whole distributions.
    """
    total = torch.logsumexp(student.float() / temperature, -1, keepdim=True)
    s = student.gather(-1, classes).float() / temperature - total
    outside = torch.log1p(-s.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    s = torch.cat([s, outside], -1)
    t = F.log_softmax(torch.cat([values, rest.unsqueeze(-1)], -1).float(), -1)
    first, second = (t, s) if direction == "forward" else (s, t)
    return F.kl_div(second, first, reduction="sum", log_target=True) * temperature**2


def in_chunks(loss: Callable[..., tuple[Tensor, ...]], chunk: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """Sum losses over chunks of rows, whose intermediate values are computed again in the backward pass instead of kept.

    Args:
        loss: function of rows ``(C, ...)`` that returns scalars.
        chunk: rows per chunk.
        rows: tensors with the same number of rows.
    """
    sums: tuple[Tensor, ...] | None = None
    for parts in zip(*(r.split(chunk) for r in rows), strict=True):
        found: Any = checkpoint(loss, *parts, use_reentrant=False)
        sums = found if sums is None else tuple(a + b for a, b in zip(sums, found, strict=True))
    assert sums is not None
    return sums


class TokenKL:
    """Distillation of a :class:`CausalLM` from a teacher with the same vocabulary.

    Logits over the vocabulary are computed in chunks of positions from the hidden states, the student's and the teacher's, so neither
    exists whole.

    Args:
        teacher: path of a causal language model, or the model.
        alpha: share of the divergence in the loss; the rest is the cross-entropy of the data.
        direction: ``"forward"`` (covers the teacher's distribution) or ``"reverse"`` (keeps to what the teacher finds probable).
        temperature: divides the logits of both.
        chunk: positions per chunk.
        top_k: keep the teacher's largest logits only, with the mass of the rest; needed for ``cache``.
        cache: folder, or a :class:`TeacherCache` of which the folder is used, for the teacher's top-k logits: a sequence that was seen
            before needs no teacher.

    Raises:
        InvalidArgumentError: an argument is out of its range; before training, a teacher with another vocabulary.
    """

    def __init__(
        self,
        teacher: Any,
        alpha: float = 0.5,
        direction: str = "forward",
        temperature: float = 1.0,
        chunk: int = 512,
        top_k: int | None = None,
        cache: str | Path | TeacherCache | None = None,
    ) -> None:
        if direction not in DIRECTIONS:
            raise InvalidArgumentError(f"Argument `direction` must be one of {DIRECTIONS}, but got {direction!r}.")
        if not 0.0 < alpha <= 1.0:
            raise InvalidArgumentError(f"Argument `alpha` must be above 0 and at most 1, but got {alpha!r}.")
        if not 0.0 < temperature < math.inf:
            raise InvalidArgumentError(f"Argument `temperature` must be above 0, but got {temperature!r}.")
        if chunk < 1 or (top_k is not None and top_k < 1):
            raise InvalidArgumentError(f"Arguments `chunk` and `top_k` must be at least 1, but got {chunk}, {top_k}.")
        if cache is not None and top_k is None:
            raise InvalidArgumentError("Argument `top_k` must be given with `cache`, but got None. Use top_k=32.")
        self.teacher, self.alpha, self.direction, self.temperature = teacher, alpha, direction, temperature
        self.chunk, self.top_k = chunk, top_k
        self.dirpath = cache.dirpath if isinstance(cache, TeacherCache) else None if cache is None else Path(cache)
        self.runs = 0  # sequences that the teacher ran on, for those who want to see the cache work
        self._model: nn.Module | None = None
        self._cache: TokenCache | None = None
        self._facts: dict[str, Any] = {}

    def setup(self, student: nn.Module) -> None:
        """Load the teacher and compare its vocabulary with the student's.

        Raises:
            InvalidArgumentError: vocabularies differ.
        """
        if self._model is None:
            self._model = load_causal_lm(self.teacher, "teacher").eval().requires_grad_(False)
        sizes = vocabulary_size(student), vocabulary_size(self._model)
        if sizes[0] != sizes[1]:
            raise InvalidArgumentError(
                f"Argument `teacher` must have the student's vocabulary of {sizes[0]:,} tokens, but got one of {sizes[1]:,}: logits of "
                "different tokens can't be compared. Use a teacher of the same family."
            )
        if self.top_k is not None and self.top_k >= sizes[0]:
            raise InvalidArgumentError(
                f"Argument `top_k` must be below the vocabulary of {sizes[0]:,} tokens, but got {self.top_k}."
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        if self._model is not None:
            self._model.to(device)

    @torch.no_grad()
    def _hidden(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        assert self._model is not None
        self.runs += len(input_ids)
        return hidden_states(self._model, input_ids, mask)

    @torch.no_grad()
    def _top_k(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logits, their tokens and the rest of one sequence, on the CPU."""
        parts = []
        for piece in hidden.split(self.chunk):
            logits = head_of(self._model)(piece).float() / self.temperature
            values, classes = logits.topk(self.top_k or 1, -1)
            rest = logits.scatter(-1, classes, -math.inf).logsumexp(-1)
            parts.append((values.cpu(), classes.cpu(), rest.cpu()))
        values, classes, rest = (torch.cat(part) for part in zip(*parts, strict=True))
        return values, classes, rest

    def _cached(self, input_ids: Tensor, mask: Tensor | None, rank: int) -> tuple[Tensor, ...]:
        """Top-k logits ``(N, T, ...)`` of a batch, from the cache where it has them."""
        found: list[Any] = [None] * len(input_ids)
        digests = TokenCache.digests(input_ids, mask)
        if self.dirpath is not None:
            if self._cache is None or self._cache.length != input_ids.shape[1]:
                self._facts = self._facts or {
                    "teacher": of_teacher(self._model, None) if self._model is not None else None,
                    "temperature": self.temperature,
                }
                folder = self.dirpath / str(input_ids.shape[1])  # rows have one length
                self._cache = TokenCache(folder, self.top_k or 1, input_ids.shape[1], self._facts, rank)
            found = [self._cache.read(digest) for digest in digests]
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            states = self._hidden(input_ids[missing], None if mask is None else mask[missing])
            for i, state in zip(missing, states, strict=True):
                found[i] = self._top_k(state)
                if self._cache is not None:
                    self._cache.write(digests[i], *found[i])
        return tuple(torch.stack(part).to(input_ids.device) for part in zip(*found, strict=True))

    def __call__(
        self, student: nn.Module, input_ids: Tensor, mask: Tensor | None, targets: Tensor, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of a batch, each the mean over the scored tokens, in nats.

        Args:
            student: the model that is trained.
            input_ids: ``(N, T)``.
            mask: ``(N, T)``, 0 at padding.
            targets: next tokens ``(N, T)``, -100 where nothing is scored.
            rank: of this process.
        """
        scored = (targets != -100).reshape(-1)
        hidden = hidden_states(student, input_ids, mask).flatten(0, 1)[scored]
        head, wanted = head_of(student), targets.reshape(-1)[scored]
        if self.top_k is None:
            states = self._hidden(input_ids, mask).flatten(0, 1)[scored]
            theirs: tuple[Tensor, ...] = (states,)
        else:
            theirs = tuple(part.flatten(0, 1)[scored] for part in self._cached(input_ids, mask, rank))

        def losses(state: Tensor, target: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(state)
            if self.top_k is None:
                with torch.no_grad():
                    whole = head_of(self._model)(teacher[0])
                divergence = token_kl(logits, whole, self.direction, self.temperature)
            else:
                values, classes, rest = teacher
                divergence = top_k_kl(logits, values, classes, rest, self.direction, self.temperature)
            return divergence, F.cross_entropy(logits.float(), target, reduction="sum")

        count = max(len(wanted), 1)
        if not len(wanted):
            raise InvalidArgumentError("Argument `labels` must score a token in each batch, but got one without any.")
        divergence, entropy = in_chunks(losses, self.chunk, hidden, wanted, *theirs)
        return divergence / count, entropy / count

    def __repr__(self) -> str:
        name = self.teacher if isinstance(self.teacher, str | Path) else type(self.teacher).__name__
        return f"TokenKL({name!r}, alpha={self.alpha}, direction={self.direction!r}, top_k={self.top_k})"


def head_of(model: Any) -> Any:
    """The output layer over the vocabulary."""
    return model.get_output_embeddings()


def hidden_states(model: Any, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states ``(N, T, D)`` that the output layer takes."""
    states: Tensor = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise if a model's logits aren't its output layer applied to its hidden states.

    Raises:
        InvalidArgumentError: they are scaled or capped.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head_of(model)(hidden_states(model, ids, None))
    finally:
        model.train(training)
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-4, atol=1e-5):
        raise InvalidArgumentError(
            f"Argument `distill` must be None for {type(model).__name__}, whose logits aren't its output layer applied to its hidden "
            "states (they are scaled or capped)."
        )
