"""Which Python of a model was run, what passed through it, and which parameters no run came across.

Where Python decides by values, one run shows one way. Layers on another way may read and write what passes through the
modules that could call them, so that has to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.axes.interpret import Interpreter
from surgery.axes.labels import Labelled
from surgery.axes.ledger import labelled_leaves


class Visits:
    """What the modules of one model that stay Python were given, gave, and handed on."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], layers: Sequence[tuple[Any, ...]]) -> None:
        """
        Args:
            modules: those of the copy that is run, with their paths.
            layers: the traced parts and layers among them that are called as one, each with its path third.
        """
        apart = {path for _, _, path, _ in layers}
        self._python = [(path, m) for path, m in modules if not any(_is_in(path, layer) for layer in apart)]
        self._whole: set[str] = set()
        """Paths of the traced parts and layers that were called."""
        self._active = [""]
        self._passed: dict[str, list[Labelled]] = {}

    @contextmanager
    def listening(self, known: Mapping[int, Labelled]) -> Iterator[None]:
        """Note calls of modules that stay Python. ``known``: labels by the ids of tensors."""
        try:
            for path, module in self._python:
                module.__dict__["forward"] = self._entered(module.forward, path, known)
            yield
        finally:
            for _, module in self._python:
                module.__dict__.pop("forward", None)

    def called(self, path: str, labels: Any) -> None:
        """A traced part or layer was called with ``labels``, or gave them."""
        self._whole.add(path)
        self._passed.setdefault(self._active[-1], []).extend(labelled_leaves(labels))

    def freeze_unseen(self, run: Interpreter, module: nn.Module) -> None:
        """Freeze what passed through the Python that could use parameters of ``module`` which no run came across."""
        seen = {name for name, _ in run.findings.axes}
        for name, parameter in module.named_parameters():
            owner = name.rpartition(".")[0]
            if name in seen or parameter.numel() < 2 or any(_is_in(owner, path) for path in self._whole):
                continue
            for path, labels in self._passed.items():
                for label in labels if _is_in(owner, path) else ():
                    for f in label.fields:
                        run.freeze(f.ids, f"{name} is not used on the example inputs, and may be on others")

    def _entered(self, forward: Callable[..., Any], path: str, known: Mapping[int, Labelled]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._active.append(path)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._active.pop()
            tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            passed = self._passed.setdefault(self._active[-1], [])
            passed += [known[id(t)] for t in tensors if id(t) in known]
            return result

        return call


def _is_in(path: str, container: str) -> bool:
    return not container or path == container or path.startswith(f"{container}.")
