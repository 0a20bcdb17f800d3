"""What a traced module computes apart from the numbers in its tensors, as text, so that a change of it can be noticed.

A recipe says how to make a module again, so it must know every change. `trace` and every step seal their result: they
note its structure. What differs from the seal later was changed in another way: a hook, a parametrization, an edit of
the graph, another layer put in.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from surgery.graph.traced import TracedModule, info, with_info

Structure = Mapping[tuple[str, str], str]
"""By qualified name and aspect (``"layer"``, ``"settings"``, ``"hooks"``, ``"forward"``, ``"graph"``, ``"tensor"``)."""

_OWN = ("torch.", "torchvision.", "surgery.")
"""Packages whose layers keep what they are made with in attributes of the same names."""


def structure(module: nn.Module) -> dict[tuple[str, str], str]:
    """All that decides what a module computes, but for the entries of its tensors, its modes and what Python outside
    its graphs does."""
    found: dict[tuple[str, str], str] = {}
    for path, part in module.named_modules():
        if isinstance(part, TracedModule):
            found[path, "graph"] = _digest(line for graph in part.graphs for line in _lines(graph))
        else:
            found[path, "layer"] = _name(type(part))
            found[path, "settings"] = _settings(part)
            found[path, "forward"] = _name(part.__dict__.get("forward", ""))
        hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        found[path, "hooks"] = ", ".join(map(_name, hooks))
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found[name, "tensor"] = f"{tuple(tensor.shape)} {first.setdefault(id(tensor), name)}"
    return {key: text for key, text in found.items() if text}


def seal(module: nn.Module) -> None:
    """Note the structure of a traced module."""
    with_info(module, seal=structure(module))


def follow_seal(before: nn.Module, after: nn.Module) -> None:
    """Seal what a step made of ``before``; what had changed there since its own seal still differs from the new one."""
    known = info(before).seal
    if known is None:
        return
    now = structure(after)
    for key in _differences(known, structure(before)):
        now.pop(key, None)
        if key in known:
            now[key] = known[key]
    with_info(after, seal=now)


def changes_since_seal(module: nn.Module) -> list[str]:
    """What differs from the seal, in words; empty where nothing does."""
    known = info(module).seal
    if known is None:
        return ["it is a part of a traced module, and has no recipe of its own"]
    now = structure(module)
    return [_words(*key, known.get(key, ""), now.get(key, "")) for key in _differences(known, now)]


def hooks(module: nn.Module) -> dict[str, str]:
    """Names of the forward hooks of a module and its parts, by qualified name."""
    return {path: text for (path, aspect), text in structure(module).items() if aspect == "hooks"}


def _differences(old: Structure, new: Structure) -> list[tuple[str, str]]:
    return [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]


def _words(path: str, aspect: str, old: str, new: str) -> str:
    where = repr(path) if path else "the model"
    if aspect == "layer":
        return f"{where} is {new or 'gone'}, and was {old or 'not there'}"
    if aspect == "hooks":
        return f"{where} has the forward hooks {new or 'none'}, and had {old or 'none'}"
    if aspect == "forward":
        return f"the forward of {where} was replaced"
    if aspect == "graph":
        return f"the graph of {where} was changed"
    if aspect == "tensor":
        return f"the tensor {where} {'changed its shape or is tied differently' if old and new else 'came or went'}"
    return f"the settings of {where} were {old}, and are {new}"


def _settings(layer: nn.Module) -> str:
    """What a layer was made with. What else it keeps, a call may work out: the scales of `MultiScaleRoIAlign`."""
    if not type(layer).__module__.startswith(_OWN):
        return ""  # what a user's own layer keeps may change with each call
    made_with = _arguments(tuple(type(layer).__mro__))
    plain = {k: v for k, v in vars(layer).items() if k in made_with and _is_plain(v)}
    return ", ".join(f"{name}={value!r}" for name, value in sorted(plain.items()))


@functools.cache
def _arguments(classes: tuple[type, ...]) -> frozenset[str]:
    """The names of what the constructors of these classes take."""
    makers = [vars(c)["__init__"] for c in classes if "__init__" in vars(c) and c is not object]
    return frozenset(name for maker in makers for name in list(inspect.signature(maker).parameters)[1:])


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _lines(graph: fx.Graph) -> Iterable[str]:
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else _name(node.target)
        yield re.sub("0x[0-9a-f]+", "", f"{node.name} {node.op} {target} {node.args} {node.kwargs}")


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
