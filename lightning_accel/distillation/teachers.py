"""Teachers that are no single torch network of the user's: several, an ONNX file, one from Hugging Face, the student itself."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel import structure
from lightning_accel.distillation.graph_layers import without_graphs
from lightning_accel.distillation.selection import select, split_path
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.extras import require


class TeacherEnsemble(nn.Module):
    """Several teachers as one: a weighted mean of their logits, or of their probabilities.

    Args:
        teachers: networks that take the student's inputs and agree in the shape of their logits.
        weights: one for each, above 0, brought to sum 1; ``None``: all the same.
        average: ``"logits"``, or ``"probabilities"``: the logarithm of the mean of softmaxes over dimension 1, so that a
            teacher with large logits doesn't rule.
        outputs: where logits are in what a teacher returns: ``"[logits]"``, ``"[0]"``; empty for a Tensor.

    Raises:
        ValueError: an argument breaks a rule above.

    Example:
        >>> TeacherEnsemble([nn.Identity(), nn.Flatten()], weights=[3, 1])(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        teachers: list[nn.Module],
        weights: list[float] | None = None,
        average: str = "logits",
        outputs: str = "",
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("Argument `teachers` must hold a teacher, but got none.")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or not all(w > 0 and math.isfinite(w) for w in weights):
            raise ValueError(
                f"Argument `weights` must be above 0, one for each of {len(teachers)} teachers, but got {weights}."
            )
        if average not in ("logits", "probabilities"):
            raise ValueError(f'Argument `average` must be "logits" or "probabilities", but got {average!r}.')
        self.teachers = nn.ModuleList(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.average = average
        self._outputs, self._keys = outputs, split_path(outputs, "outputs")[1]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of all teachers, averaged."""
        logits = [select(t(*args, **kwargs), self._keys, self._outputs, "outputs") for t in self.teachers]
        if self.average == "probabilities":
            logs = [F.log_softmax(x.float(), dim=1) + math.log(w) for x, w in zip(logits, self.weights, strict=True)]
            return torch.logsumexp(torch.stack(logs), dim=0)
        return torch.stack([w * x for w, x in zip(self.weights, logits, strict=True)]).sum(0)


class OnnxTeacher(nn.Module):
    """A teacher in a file: ONNX, a TensorRT engine or a bundle, run by :func:`load_runner`.

    Args:
        path: file or bundle, or a :class:`Runner` that is open already.
        engine: as for :func:`load_runner`.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: a file that no engine takes.

    Example:
        >>> teacher = OnnxTeacher("teacher.onnx")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path | Runner, engine: str | None = None) -> None:
        super().__init__()
        self.runner = path if isinstance(path, Runner) else load_runner(path, engine)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The output of a network with one, else a dict of all by name. Floats are cast to what the file asks for."""
        feeds = dict(zip(self.runner.input_names, args, strict=False)) | kwargs
        device = next(iter(feeds.values())).device
        dtypes = {spec.name: spec.dtype for spec in self.runner.inputs}
        arrays = {}
        for name, tensor in feeds.items():
            array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
            arrays[name] = array.astype(dtypes.get(name, array.dtype)) if tensor.is_floating_point() else array
        outputs = {name: torch.from_numpy(array).to(device) for name, array in self.runner.run(arrays).items()}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A teacher that runs in an engine can't be pickled. Build it in each process.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxTeacher":
        return self  # an engine holds no weights that a copy could change


class HuggingFaceTeacher(nn.Module):
    """A pretrained model of ``transformers``, from a folder or the hub.

    Args:
        name_or_path: folder or name on the hub.
        auto_class: class of ``transformers`` that builds it.
        options: further arguments of its ``from_pretrained``, e.g. ``{"output_hidden_states": True}``.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
        ValueError: ``auto_class`` isn't in it.

    Example:
        >>> teacher = HuggingFaceTeacher("my-folder", options={"output_hidden_states": True})  # doctest: +SKIP
    """

    layers_in = "network"

    def __init__(
        self,
        name_or_path: str,
        auto_class: str = "AutoModelForSequenceClassification",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        transformers = require("transformers", "transformers", "`HuggingFaceTeacher`")
        make = getattr(transformers, auto_class, None)
        if make is None or not hasattr(make, "from_pretrained"):
            raise ValueError(
                f"Argument `auto_class` must be a class of transformers with from_pretrained, but got {auto_class!r}."
            )
        self.network = make.from_pretrained(name_or_path, **(options or {}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns: an object with ``logits``."""
        return self.network(*args, **kwargs)


class EMATeacher(nn.Module):
    """The student's own average over steps (https://arxiv.org/abs/1703.01780): self-distillation.

    Built from the student when ``fit`` begins, without its captured graphs, so it stays float while the student is
    quantized. It is part of the training's state: the checkpoint keeps it beside the student, and a resume goes on with it.

    Args:
        decay: share of the average that stays at each optimizer step, in [0, 1).
        warmup: whether the first steps use ``min(decay, (1 + step) / (10 + step))``, so that the untrained start fades fast.

    Raises:
        ValueError: ``decay`` is out of its range.

    Example:
        >>> EMATeacher(decay=0.99).decay
        0.99
    """

    layers_in = "network"

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"Argument `decay` must be in [0, 1), but got {decay}.")
        self.decay, self.warmup = decay, warmup
        self.network: nn.Module | None = None
        self._method, self._path = "forward", ""

    def begin_(self, student: nn.Module, path: str, method: str) -> None:
        """Become a copy of the submodule of a student whose ``method`` makes the logits."""
        part = student.get_submodule(path)
        trainer = vars(part).get("_trainer")
        with without_graphs(part):
            try:
                if trainer is not None:
                    vars(part)["_trainer"] = None
                self.network = copy.deepcopy(part).eval().requires_grad_(False)
            finally:
                if trainer is not None:
                    vars(part)["_trainer"] = trainer
        self._path, self._method = path, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the average returns."""
        if self.network is None:
            raise RuntimeError("An EMATeacher exists only in `fit`: it is made of the student when training begins.")
        return getattr(self.network, self._method)(*args, **kwargs)

    def change_(self, change: structure.Change) -> None:
        """Lose the channels that the student has lost; an average of a part of it starts anew at the next step."""
        if self.network is not None and not self._path:
            structure.apply(self.network, change)

    @torch.no_grad()
    def update_(self, student: nn.Module, step: int) -> None:
        """Move towards the student after an optimizer step.

        Args:
            student: as in :meth:`begin_`. One that changed its shapes, since channels left, starts the average anew.
            step: optimizer steps before this one.
        """
        ours, theirs = self._state(self.network), self._state(student.get_submodule(self._path))
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            self.begin_(student, self._path, self._method)
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        floats = [k for k, v in ours.items() if v.is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for key, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[key])

    @staticmethod
    def _state(network: nn.Module | None) -> dict[str, Tensor]:
        return {} if network is None else {**dict(network.named_parameters()), **dict(network.named_buffers())}
