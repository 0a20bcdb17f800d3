"""Which code belongs to a model: the packages of its classes, and the hooks that they set."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Owner:
    """How the forward hooks that are a part of what a model computes are told from those that its user sets.

    Attributes:
        packages: of the model's classes, besides torch.
        libraries: those of them that are installed: their hooks are the model's own.
        classes: the model's classes with their modules: hooks that are defined in them are its own.
        before: keys of the hooks that were there before tracing: all others among them are the user's. Those that the
            model sets while it runs are its own.
    """

    packages: frozenset[str]
    libraries: frozenset[str]
    classes: frozenset[str]
    before: frozenset[int]


def owner_of(root: nn.Module) -> Owner:
    """How the own hooks of a model that is about to be traced are known."""
    packages = packages_of(root)
    libraries = {name for name in packages if _is_installed(name)}
    before = {key for module in root.modules() for key in module._forward_hooks}
    classes = {f"{cls.__module__}.{cls.__qualname__}." for m in root.modules() for cls in type(m).__mro__}
    return Owner(frozenset(packages), frozenset(libraries), frozenset(classes), frozenset(before))


def packages_of(root: nn.Module) -> set[str]:
    """The packages, besides torch, that the classes of a model and its parts come from."""
    classes = {base for m in root.modules() for base in type(m).__mro__}
    return {cls.__module__.partition(".")[0] for cls in classes} - {"torch", "builtins", "surgery", "typing", "abc"}


def own_hooks(module: nn.Module, owner: Owner) -> list[tuple[int, Any]]:
    """The forward hooks of a module that are a part of what the model computes."""
    hooks: Mapping[int, Any] = module._forward_hooks
    return [(key, hook) for key, hook in hooks.items() if _is_own(key, hook, owner)]


def _is_own(key: int, hook: Any, owner: Owner) -> bool:
    module, name = (str(getattr(hook, attribute, "")) for attribute in ("__module__", "__qualname__"))
    package = module.partition(".")[0]
    if key not in owner.before:
        return package in owner.packages
    return package in owner.libraries or f"{module}.{name}".startswith(tuple(owner.classes))


def _is_installed(package: str) -> bool:
    """Whether an installer put it where it is: among an environment's packages, or in another folder that has the
    metadata of packages beside them, such as that of a user or of ``pip install --target``."""
    file = str(getattr(sys.modules.get(package), "__file__", None) or "")
    if any(file.startswith(sysconfig.get_path(name)) for name in ("purelib", "platlib")):
        return True
    path = Path(file)
    folder = path.parent.parent if path.name == "__init__.py" else path.parent
    return bool(file) and any(folder.glob("*.dist-info"))
