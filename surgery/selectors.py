"""One way to say *where*: which layers of a model an operation is for.

A selector is

- a qualified name, as ``named_modules`` prints it: ``"layer1.0.conv1"``; of a container, what is inside: ``"layer3"``;
- a glob over qualified names, in which ``*`` stands for dots too: ``"layer*.conv2"``, ``"layer[34]"``;
- a class of layers: ``nn.Conv2d``, or in text, such as a command line, ``"nn.Conv2d"`` (tracing does not keep the
  classes of most containers: name these);
- a predicate of name and module: ``lambda name, module: name.endswith("conv2")``;
- a collection of selectors: ``["layer3", nn.Linear]``; as the key of a mapping a tuple.

`select` lists the names that a selector means, so that it can be tried before it is used:

    >>> surgery.select(traced, "layer[34]")
    ('layer3', 'layer4')
    >>> surgery.slim(traced, {nn.Conv2d: 0.5, "layer4": 0.25})

Where several selectors reach one layer, the most specific decides: see `rank`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from surgery.errors import UsageError, unknown_name

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Where: TypeAlias = Selector | Iterable["Where"]


def select(module: nn.Module, where: Where) -> tuple[str, ...]:
    """The names of the layers and containers that a selector means.

    A glob, class or predicate that matches a container stands for all of it: what is inside is not listed again.

    Args:
        module: any module, traced or not.
        where: a name, glob, module class, predicate, or a collection of these.

    Returns:
        Qualified names, each once; for each selector in the order of ``named_modules``.

    Raises:
        UsageError: a selector matches nothing, or is of another type. The message lists close names.

    Example:
        >>> surgery.select(torchvision.models.resnet18(), ["layer4.*.conv2", nn.Linear])
        ('layer4.0.conv2', 'layer4.1.conv2', 'fc')
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    return tuple(dict.fromkeys(name for s in each_selector(where) for name in outermost(matches(modules, s))))


def each_selector(where: Where) -> Iterator[Selector]:
    """The selectors in a collection, or the one given.

    Raises:
        UsageError: something is not a selector.
    """
    if isinstance(where, (str, type)) or (callable(where) and not isinstance(where, nn.Module)):
        if isinstance(where, type) and not issubclass(where, nn.Module):
            raise UsageError(f"a class that selects layers is a subclass of nn.Module, not {where.__name__}")
        yield where
    elif isinstance(where, Iterable) and not isinstance(where, nn.Module):
        for part in where:
            yield from each_selector(part)
    else:
        raise UsageError(
            "layers are selected by a name, a glob, a module class, a predicate or a collection of these, not "
            f"{type(where).__name__ if isinstance(where, nn.Module) else repr(where)}"
        )


def matches(
    modules: Mapping[str, nn.Module], selector: Selector, more: Iterable[str] = (), kind: str = "layer"
) -> list[str]:
    """All names that one selector matches, those inside of matched containers too.

    Args:
        modules: modules by qualified name.
        more: further names that a name or glob can match, such as parameters'.
        kind: what is selected, for errors.

    Raises:
        UsageError: it matches nothing.
    """
    if isinstance(selector, str):
        names = dict.fromkeys([*modules, *more])
        cls = class_named(selector)
        if selector in names:
            return [selector]
        if cls is None:
            found = [name for name in names if name and is_glob(selector) and fnmatchcase(name, selector)]
            if not found:
                raise unknown_name(kind, selector, filter(None, names))
            return found
        selector = cls
    if isinstance(selector, type):
        found = [name for name, module in modules.items() if name and isinstance(module, selector)]
    else:
        found = [name for name, module in modules.items() if name and selector(name, module)]
    if not found:
        classes = sorted({type(m).__name__ for name, m in modules.items() if name and not any(m.children())})
        hint = f": there are {', '.join(classes)}" if isinstance(selector, type) else ""
        raise UsageError(f"no {kind} matches {describe_selector(selector)}{hint}")
    return found


def outermost(names: Iterable[str]) -> list[str]:
    """The names that are inside of no other one."""
    given = dict.fromkeys(names)
    return [n for n in given if not any(n[:k] in given for k, letter in enumerate(n) if letter == ".")]


def rank(selector: Selector) -> tuple[int, int]:
    """How specific a selector is; the larger decides.

    A layer's name comes before a glob, a glob before a container's name, and that before a class or predicate. The
    caller raises the first number of a layer's name to 3. Of globs the one that spells out more letters is more
    specific, of containers the inner one, of classes the subclass.
    """
    if isinstance(selector, str) and class_named(selector) is None:
        return (2 if is_glob(selector) else 1), len(re.sub(r"\[.*?\]|[*?]", "", selector))
    cls = class_named(selector) if isinstance(selector, str) else selector
    return 0, len(cls.__mro__) if isinstance(cls, type) else 0


def is_glob(name: str) -> bool:
    """Whether a name has wildcards."""
    return any(c in name for c in "*?[")


def class_named(name: str) -> type[nn.Module] | None:
    """The class of ``torch.nn`` that a text such as ``"nn.Conv2d"`` names; None for any other text."""
    found = getattr(nn, name[3:], None) if name.startswith("nn.") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def describe_selector(selector: Selector) -> str:
    """A selector in an error message."""
    if isinstance(selector, str):
        return repr(selector)
    name = getattr(selector, "__name__", repr(selector))
    return f"the class {name}" if isinstance(selector, type) else f"the predicate {name}"
