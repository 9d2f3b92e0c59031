"""Text as packed token sequences: encode, concatenate, cut."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.language_models.perplexity import IGNORED


def load_tokenizer(source: Any) -> Any:
    """The tokenizer of a folder, of a ``.gguf`` file or of a hub name; a tokenizer is returned as it is.

    Raises:
        MissingPackageError: transformers isn't installed.
        InvalidArgumentError: there is none.
    """
    if not isinstance(source, str | Path):
        return source
    transformers = require("transformers", "lm", "A tokenizer")
    path = Path(source)
    try:
        if path.suffix == ".gguf":
            return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return transformers.AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidArgumentError(
            f"Argument `tokenizer` must be a folder with a tokenizer, but got {str(source)!r}: {reason}"
        ) from error


def pack_tokens(texts: Iterable[str], tokenizer: Any, length: int) -> Tensor:
    """Encode texts, join them with the end-of-text token, and cut the stream into sequences without padding.

    Args:
        texts: documents.
        tokenizer: a tokenizer of transformers.
        length: tokens per sequence.

    Returns:
        ``(N, length)``, int64; the tokens behind the last whole sequence are dropped.

    Raises:
        InvalidArgumentError: ``length`` is below 2, or there are fewer tokens than that.
    """
    if length < 2:
        raise InvalidArgumentError(f"Argument `length` must be at least 2, but got {length}.")
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // length
    if not count:
        raise InvalidArgumentError(
            f"Argument `texts` must have at least `length` ({length}) tokens, but got {len(stream)}. Use a smaller `length`."
        )
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def chat_tokens(conversations: Iterable[Sequence[dict[str, str]]], tokenizer: Any, length: int) -> dict[str, Tensor]:
    """Encode conversations with the tokenizer's chat template; only the assistant's tokens are scored.

    Args:
        conversations: lists of ``{"role": ..., "content": ...}``.
        tokenizer: a tokenizer of transformers with a chat template.
        length: tokens per sequence: longer conversations are cut, shorter ones are padded.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, ``(N, length)`` each; labels are -100 at all tokens but the assistant's.

    Raises:
        InvalidArgumentError: the tokenizer has no chat template, or the template of the first turns isn't the beginning of that of all.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError("Argument `tokenizer` must have a `chat_template`, but got one without. Set it.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rows: list[list[list[int]]] = []
    for turns in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(turns):
            text = tokenizer.apply_chat_template(list(turns[: i + 1]), tokenize=False)
            whole = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if whole[: len(ids)] != ids:
                raise InvalidArgumentError(
                    f"Argument `tokenizer` must have a chat template that only appends, but got one that changes turn {i} once the next "
                    "one follows."
                )
            new = whole[len(ids) :]
            labels += new if turn["role"] == "assistant" else [IGNORED] * len(new)
            ids = whole
        used, rest = min(len(ids), length), max(length - len(ids), 0)
        rows.append([ids[:used] + [pad] * rest, [1] * used + [0] * rest, labels[:used] + [IGNORED] * rest])
    table = torch.tensor(rows, dtype=torch.int64)
    return dict(zip(("input_ids", "attention_mask", "labels"), table.unbind(1), strict=True))


class TokenSequences(Dataset[dict[str, Tensor]]):
    """Sequences as batches of a :class:`CausalLM`.

    Args:
        columns: ``input_ids`` ``(N, T)`` and, if needed, ``attention_mask`` and ``labels``.
    """

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


class TokenDataModule(L.LightningDataModule):
    """Text files as packed sequences, with the end of the text held out.

    Args:
        files: text file(s) in UTF-8.
        tokenizer: a folder with a tokenizer, or a tokenizer of transformers.
        length: tokens per sequence.
        batch_size: sequences per batch.
        held_out: share of the characters, at the end of all text, that validation and test use.
        texts: documents instead of ``files``.

    Raises:
        InvalidArgumentError: an argument is out of its range; in ``setup``, too little text.
        MissingFileError: a file doesn't exist.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        tokenizer: Any = None,
        length: int = 256,
        batch_size: int = 8,
        held_out: float = 0.1,
        texts: list[str] | None = None,
    ) -> None:
        super().__init__()
        if (files is None) == (texts is None):
            raise InvalidArgumentError("Exactly one of the arguments `files` and `texts` must be given.")
        if not 0.0 < held_out < 1.0:
            raise InvalidArgumentError(f"Argument `held_out` must be between 0 and 1, but got {held_out}.")
        if batch_size < 1:
            raise InvalidArgumentError(f"Argument `batch_size` must be at least 1, but got {batch_size}.")
        self.files = [files] if isinstance(files, str) else list(files or ())
        for file in self.files:
            if not Path(file).is_file():
                raise MissingFileError(f"Argument `files` must be text files, but got {file!r}, which does not exist.")
        self.tokenizer, self.length, self.batch_size, self.held_out = tokenizer, length, batch_size, held_out
        self.texts = texts
        self.train: TokenSequences | None = None
        self.held: TokenSequences | None = None

    @override
    def setup(self, stage: str) -> None:
        if self.train is not None:
            return
        self.tokenizer = load_tokenizer(self.tokenizer)
        texts = self.texts or [Path(file).read_text(encoding="utf-8") for file in self.files]
        total = sum(map(len, texts))
        left = round(total * (1 - self.held_out))  # characters that are trained on
        train, held = [], []
        for text in texts:
            train += [text[:left]] if left > 0 else []
            held += [text[max(left, 0) :]] if len(text) > left else []
            left -= len(text)
        self.train = TokenSequences(input_ids=pack_tokens(train, self.tokenizer, self.length))
        self.held = TokenSequences(input_ids=pack_tokens(held, self.tokenizer, self.length))

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.train is not None
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=len(self.train) >= self.batch_size)

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.held is not None
        return DataLoader(self.held, self.batch_size)

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()
