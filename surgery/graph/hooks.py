"""Which code belongs to a model: the packages of its classes, and the hooks that they set."""

from __future__ import annotations

from typing import Any

from torch import nn


def packages_of(root: nn.Module) -> set[str]:
    """The packages, besides torch, that the classes of a model and its parts come from."""
    classes = {base for m in root.modules() for base in type(m).__mro__}
    return {cls.__module__.partition(".")[0] for cls in classes} - {"torch", "builtins", "surgery", "typing", "abc"}


def own_hooks(module: nn.Module, packages: set[str]) -> list[tuple[int, Any]]:
    """The forward hooks of a module that code of the model's packages has set: they are part of what it computes."""
    return [
        (key, hook)
        for key, hook in module._forward_hooks.items()
        if str(getattr(hook, "__module__", "")).partition(".")[0] in packages
    ]
