"""Run a network on calibration batches without computing all of it each time: only the blocks that are wanted run."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_accel.core.effective_weight import linear_layers
from lightning_accel.core.patching import swapped
from lightning_accel.quantization.weight_only.layers import block_of

_MUCH = 2**32  # bytes of results of blocks that are kept
Function = Callable[..., Any]
Value = TypeVar("Value")


class BlockRuns:
    """Runs of a network in eval mode on calibration batches.

    A block that doesn't have to run returns what it returned before. The code between the blocks runs each time, so masks, position
    embeddings and caches are those of the run. Whether a block's result depends on the other blocks by what they return alone, or even
    by what the block before it returns alone, is tried on the first batch. If only the former is so, the results of all blocks are kept
    instead of the last ones; if neither is, the whole network runs.

    Args:
        module: the network.
        names: layers whose weights will change.
        batches: calibration data.
        call: runs the network on a batch.
        results: whether :meth:`results` is needed: the network's results must depend on what the blocks return alone, too.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], batches: Sequence[Any], call: Function, *, results: bool = False
    ) -> None:
        self._layers = {name: module.get_submodule(name) for name in names}
        self._blocks = _blocks(module, names)
        self._modules = {block: set(block.modules()) for block in self._blocks}
        self._parameters = {block: {id(p) for p in block.parameters()} for block in self._blocks}
        self._open = {id(layer.weight) for layer in self._layers.values()}  # weights that will change
        self._batches, self._call = batches, call
        # Results of the first blocks, for each batch, once they are final.
        self._kept: list[list[Any]] = [[] for _ in batches]
        self._record = self._recorded(0)
        self._order = self._record.order  # empty: the whole network runs
        self._chain = False
        self._prove(results)
        # A run may end early where all batches call each block once: else the data says how often a block is called.
        self._ends = not results and len(set(self._order)) == len(self._order)
        self._ends = self._ends and all(self._order_of(batch) == self._order for batch in batches[1:])

    def through(self, names: Iterable[str]) -> None:
        """Run each batch up to the last block that has one of some layers, with the weights as they are."""
        last = self._last([self._layers[name] for name in names])
        for batch, kept in zip(self._batches, self._kept, strict=True):
            self._run(batch, _Run(self._order, kept, last, partial(self._keep, kept)))

    def finish(self, names: Iterable[str]) -> None:
        """Declare the weights of some layers final."""
        self._open -= {id(self._layers[name].weight) for name in names}

    def results(self, parts: Iterable[nn.Module], index: int) -> list[torch.Tensor]:
        """Run a batch and return tensors in which a change of some modules shows if it shows in the network's results.

        Args:
            parts: the modules that change.
            index: of the batch.
        """
        wanted = set(parts)
        places = [place for place, block in enumerate(self._order) if self._modules[block] & wanted]
        within = wanted <= {part for place in places for part in self._modules[self._order[place]]}
        run = _Run(self._order)
        if places and within and (self._chain or len(places) == 1):
            if index != self._record.index:
                self._record = self._recorded(index)
            if self._record.order == self._order:
                run = _Run(self._order, self._before(places[0]), places[-1])
        result = self._run(self._batches[index], run)
        return [leaf.detach().float().clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    def _run(self, batch: Any, run: "_Run") -> Any:
        """Result of the last block that is wanted, or of the network."""
        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(swapped(block, "forward", run.steered(block, block.forward)))
            try:
                return self._call(batch)
            except _Reached as reached:
                return reached.result

    def _recorded(self, index: int) -> "_Record":
        """Run a batch and record what each block returns."""
        record = _Record(index)

        def add(_: int, block: nn.Module, result: Any) -> None:
            record.order.append(block)
            record.results.append(_copy(result))

        run = _Run(None, observe=add)

        def watched(forward: Function) -> Function:
            def watch(*args: Any, **kwargs: Any) -> Any:
                record.loose = record.loose or not run.inside
                return forward(*args, **kwargs)

            return watch

        with ExitStack() as stack:
            for layer in {*self._layers.values()} - {*self._blocks}:
                stack.enter_context(swapped(layer, "forward", watched(layer.forward)))
            record.results.append(self._run(self._batches[index], run))
        return record

    def _order_of(self, batch: Any) -> list[nn.Module]:
        order: list[nn.Module] = []
        self._run(batch, _Run(None, observe=lambda _, block, result: order.append(block)))
        return order

    def _prove(self, results: bool) -> None:
        # The last block first: what it reads from objects is then as `_disturb` left it, since no block before it has run.
        ends = [*([None] if results else []), *reversed(range(len(self._order)))]
        ways = (True, False) if self._fits() else (True,)
        for self._chain in ways:
            self._disturb()
            if not self._record.loose and all(self._is_reproduced(end) for end in ends):
                break
        else:
            self._order = []
        if not results:
            self._record = _Record(-1)

    def _disturb(self) -> None:
        """Run with other values, so that a block which reads what another one has left on an object doesn't find what was recorded."""
        if len(self._batches) > 1:
            self._call(self._batches[1])
            return
        weights = [w for layer in self._layers.values() if isinstance(w := layer.weight, torch.Tensor)]
        before = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data * 1.25
            self._call(self._batches[0])
        finally:
            for weight, data in zip(weights, before, strict=True):
                weight.data = data

    def _fits(self) -> bool:
        """Whether the results of all blocks may be kept for all batches, should that be necessary."""
        tensors = [leaf for leaf in tree_leaves(self._record.results) if isinstance(leaf, torch.Tensor)]
        return sum(t.nbytes for t in tensors) * len(self._batches) <= _MUCH

    def _is_reproduced(self, end: int | None) -> bool:
        """Whether a block returns the same when the blocks before it don't run; ``None`` stands for the network."""
        kept = self._before(len(self._order) if end is None else end)
        try:
            result = self._run(self._batches[self._record.index], _Run(self._order, kept, end))
        except Exception:  # code that needs what wasn't computed fails with anything
            return False
        return _equal(result, self._record.results[-1 if end is None else end])

    def _before(self, place: int) -> list[Any]:
        """Recorded results of the blocks before one."""
        results = self._record.results[:place]
        return [*map(_empty, results[:-1]), *results[-1:]] if self._chain else results

    def _keep(self, kept: list[Any], place: int, block: nn.Module, result: Any) -> None:
        if place == len(kept) and not self._parameters[block] & self._open:
            if self._chain and kept:
                kept[-1] = _empty(kept[-1])
            kept.append(_copy(result))

    def _last(self, layers: list[nn.Module]) -> int | None:
        """The place of the last block that has one of some layers; ``None`` if a layer may be called later as well."""
        places = [place for place, block in enumerate(self._order) if self._modules[block] & set(layers)]
        called = {part for place in places for part in self._modules[self._order[place]]}
        return places[-1] if self._ends and set(layers) <= called else None


@dataclass
class LatestInput(Generic[Value]):
    """What was computed from the tensor that a layer read last, for the next layer that reads it, too."""

    _tensor: torch.Tensor | None = None
    _version: int = 0
    _value: Value | None = None

    def get(self, x: torch.Tensor) -> Value | None:
        """The value that was put for a tensor, unless another one was put since, or the tensor was changed in place."""
        if x.is_inference():  # such a tensor doesn't count its changes
            return None
        return self._value if self._tensor is x and self._version == x._version else None

    def put(self, x: torch.Tensor, value: Value) -> None:
        """Keep a value for a tensor."""
        if not x.is_inference():
            self._tensor, self._version, self._value = x, x._version, value


class _Reached(BaseException):  # `except Exception` in a network must not catch it
    """Ends a run behind the last block that is wanted."""

    def __init__(self, result: Any) -> None:
        self.result = result


@dataclass
class _Record:
    """A run in which everything was computed."""

    index: int
    order: list[nn.Module] = field(default_factory=list)  # blocks as they were called
    results: list[Any] = field(default_factory=list)  # theirs, and the network's
    loose: bool = False  # whether a layer is called outside of its block


@dataclass
class _Run:
    """One run.

    Args:
        order: the order in which the blocks are expected; from where a run departs from it, everything is computed. ``None``: any.
        kept: results of the first blocks, which don't run.
        last: place of the block behind which the run ends; ``None``: at its end.
        observe: is called with place, block and result of each block that runs.
    """

    order: list[nn.Module] | None
    kept: list[Any] = field(default_factory=list)
    last: int | None = None
    observe: Callable[[int, nn.Module, Any], None] = lambda *_: None
    place: int = 0
    inside: bool = False
    follows: bool = True

    def steered(self, block: nn.Module, forward: Function) -> Function:
        """The ``forward`` of a block in this run."""

        @wraps(forward)
        def steer(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # of another block that contains this one
                return forward(*args, **kwargs)
            place, self.place = self.place, self.place + 1
            self.follows &= self.order is None or self.order[place : place + 1] == [block]
            if self.follows and place < len(self.kept):
                return _copy(self.kept[place])  # it may be changed in place
            self.inside = True
            try:
                result = forward(*args, **kwargs)
            finally:
                self.inside = False
            if self.follows:
                self.observe(place, block, result)
                if place == self.last:
                    raise _Reached(result)
            return result

        return steer


def _blocks(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The blocks of a network: of repeated ones also those without a layer of ``names``, and each of these that is in none by itself."""
    layers = list(linear_layers(module))
    inner = {block_of(name) for name in layers} - set(layers)
    roots = {name.split(".")[0] for name in layers if name.split(".")[0].isdigit()}  # of a `Sequential`
    roots -= {name.split(".")[0] for name in inner}
    blocks: dict[nn.Module, None] = {}
    for name in layers:
        block = block_of(name)
        if block == name:
            root = name.split(".")[0]
            block = root if root in roots else name
            if block == name and name not in names:
                continue
        part = module.get_submodule(block)
        while isinstance(part, nn.ModuleList | nn.ModuleDict):  # never called
            block = ".".join(name.split(".")[: block.count(".") + 2])
            part = module.get_submodule(block)
        blocks[part] = None
    return list(blocks)


def _copy(result: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, result)


def _empty(result: Any) -> Any:
    """Zeros in place of the tensors, without memory."""

    def zeros(leaf: Any) -> Any:
        return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(zeros, result)


def _equal(one: Any, other: Any) -> bool:
    """Whether the tensors of two results are the same, bit for bit."""
    leaves = tree_leaves(one), tree_leaves(other)
    if len(leaves[0]) != len(leaves[1]):
        return False
    pairs = zip(*leaves, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
