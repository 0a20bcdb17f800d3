"""What is done to a model, as data: frozen steps that can be printed, compared, stored as JSON and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from surgery.errors import UsageError, unknown_name
from surgery.graph.tracing import info

SCHEMA = 1
MEAN = -1
"""The entry of an index that stands for the mean of all units of its group (`surgery.edit.means`)."""


@dataclass(frozen=True)
class Noise:
    """Noise on the weights of copies, so that they learn different things (`surgery.edit.noise`).

    Attributes:
        kind: ``"zero-sum"``: on the weights that read a copied unit, adding up to zero over its copies: exact.
            ``"plain"``: on the weights that write the copies, all but the first: inexact.
        scale: its standard deviation, in those of the weight that it is added to.
        seed: of the draws; each axis of each parameter has draws of its own.
    """

    kind: str
    scale: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("zero-sum", "plain"):
            raise unknown_name("kind of noise", self.kind, ("zero-sum", "plain"))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"noise must be a number above 0, not {self.scale}")


@dataclass(frozen=True)
class Reindex:
    """Gather dimension groups by an index: one primitive for slimming, pruning, widening and permuting.

    Attributes:
        indices: for each group, by name, the old unit that each new unit copies, or `MEAN`.
        shares: for each group that is named, and each new unit, the factor of the layers that contract over it; the
            factors of one old unit's copies sum to 1, that of a mean is 0. By default copies share evenly
            (Net2WiderNet, section 3.1 of Chen et al. 2016).
        noise: on the weights of the copies.
    """

    indices: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    noise: Noise | None = None


@dataclass(frozen=True)
class InsertIdentity:
    """Insert new layers that compute the identity behind an existing one (Net2DeeperNet).

    Attributes:
        after: qualified name of the layer or container whose output the new layers read.
        name: qualified name of the container of the new layers.
        form: ``"layer"``: an identity layer, and the activation again where it is idempotent; ``"residual"``: a block
            with a skip connection whose last layer is zero.
        kernel: kernel size of the identity convolution, odd in each direction; empty for a linear layer.
        norm: whether a BatchNorm follows the identity layer.
        activation: class name in `torch.nn` of the activation, ``"Maxout"``, or empty.
        channels: number of channels of the value read.
        seed: of the random weights of a residual block's first layer.
        pieces: of a maxout activation, each of them the identity; 1 for any other.
        eps: of the BatchNorm, such that the variance that makes it the identity is a number of the weights' dtype.
    """

    after: str
    name: str
    form: str
    kernel: tuple[int, ...]
    norm: bool
    activation: str
    channels: int
    seed: int = 0
    pieces: int = 1
    eps: float = 2.0**-17


@dataclass(frozen=True)
class InsertBlock:
    """Insert a copy of a block behind it, whose last layers are 0, so that it hands on what it is given (LLaMA-Pro, ACL
    2024).

    Attributes:
        after: qualified name of the container behind whose output the copy stands; of a layer in the block, where no
            container is the block.
        name: qualified name of the copy.
        like: qualified name of the container that is copied; empty where none is the block. Then it is the smallest
            block at the end of ``after``, or that ``after`` is in.
        zeros: qualified names of the copy's tensors that are 0.
    """

    after: str
    name: str
    like: str
    zeros: tuple[str, ...]


@dataclass(frozen=True)
class InsertDense:
    """Insert one more layer at the end of a dense block, made of its last one. Whatever reads the block reads the new
    channels with weights of 0 (`surgery.edit.insert_dense`).

    Attributes:
        after: qualified name of the container at whose end the dense block is.
        name: qualified name of the new layer.
        like: qualified name of the container that is the block's last layer; empty where none is.
    """

    after: str
    name: str
    like: str


Step = Reindex | InsertIdentity | InsertBlock | InsertDense
_STEPS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Reindex, InsertIdentity, InsertBlock, InsertDense)}


@dataclass(frozen=True)
class Recipe:
    """The edits made since `surgery.trace`, in order, and where the architecture came from."""

    source: str | None
    steps: tuple[Step, ...]

    def to_json(self, indent: int | None = None) -> str:
        """As JSON text; runs of an index are written ``"first:last+1"``."""
        steps = [{"step": type(s).__name__, **_encode(asdict(s))} for s in self.steps]
        return json.dumps({"schema": SCHEMA, "source": self.source, "steps": steps}, indent=indent)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The inverse of `to_json`. Raises `UsageError` for text that is no recipe, or one of another schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise UsageError(f"recipe has schema {data['schema']}, this version reads {SCHEMA}")
            return Recipe(data["source"], tuple(_step(s) for s in data["steps"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"not a recipe: {error!r}") from error


def recipe(module: nn.Module) -> Recipe:
    """What was done to a traced module since `surgery.trace`."""
    known = info(module)
    return Recipe(known.source, known.steps)


def _step(data: dict[str, Any]) -> Step:
    cls = _STEPS.get(data["step"])
    if cls is None:
        raise UsageError(f"unknown step {data['step']!r}")
    values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
    if cls is Reindex:
        indices = {name: tuple(_expand_runs(index)) for name, index in values["indices"].items()}
        shares = {name: tuple(map(float, s)) for name, s in values.get("shares", {}).items()}
        return Reindex(indices, shares, Noise(**values["noise"]) if values.get("noise") else None)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[no-any-return]


def _encode(values: dict[str, Any]) -> dict[str, Any]:
    if "indices" in values:
        values["indices"] = {name: _runs(index) for name, index in values["indices"].items()}
        for optional in ("shares", "noise"):
            if not values[optional]:
                del values[optional]
    return values


def _runs(index: Sequence[int]) -> list[int | str]:
    """``[0, 1, 2, 3, 7]`` as ``["0:4", 7]``."""
    result: list[int | str] = []
    start = 0
    for end in range(1, len(index) + 1):
        if end < len(index) and index[end] == index[end - 1] + 1:
            continue
        result.append(f"{index[start]}:{index[end - 1] + 1}" if end - start > 2 else index[start])
        if end - start == 2:
            result.append(index[start + 1])
        start = end
    return result


def _expand_runs(runs: Iterable[int | str]) -> Iterable[int]:
    for run in runs:
        if isinstance(run, str):
            first, last = run.split(":")
            yield from range(int(first), int(last))
        else:
            yield int(run)
