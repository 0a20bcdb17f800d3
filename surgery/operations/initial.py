"""What a model's own initialisers draw, by the names of its parameters.

A layer's class knows a way to initialise it, and the constructor of a model may know another: ResNets draw their
convolutions in another way, Vision Transformers have tokens of their own. So the architecture is built again where it
is known. An edited model has other widths than its source; then the source is built once more, with each parameter
given its edited shape when its layer registers it, before anything draws from it. Fans are those of the edited layer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery import models as catalogue
from surgery.edit.step import Step
from surgery.errors import UsageError
from surgery.graph.tracing import info

Fresh = nn.Module | Callable[[], nn.Module]
"""A newly initialised model, or what makes one."""

_OWN = 0x7E5E7


def initial_values(
    module: nn.Module, names: Collection[str], *, seed: int, fresh: Fresh | None = None, trust: bool = False
) -> dict[str, Tensor]:
    """New values for some parameters of a traced module, as their initialisers draw them.

    They come from ``fresh``, else from the architecture that the module's source names, built again. A container that
    a step inserted as a copy takes those of what it copies, in another order. What is in neither is
    drawn by its layer's class (``reset_parameters``).

    Returns:
        by name, on the CPU; parameters that nothing initialises are left out.
    """
    if not names:
        return {}
    known = info(module)
    own = dict(module.named_parameters(remove_duplicate=False))
    with seeded_draws(seed):
        built = _build(_factory(known.source, fresh, trust), module, own)
        if fresh is not None and own.keys().isdisjoint(built):
            raise UsageError("what is passed as fresh= is another model: it has none of the parameters' names")
        found: dict[str, Tensor] = {}
        for name in names:
            value = built.get(_counterpart(name, built, known.steps))
            if value is not None:
                found[name] = value if name in built else _resample(value, own[name].shape)
        found |= _by_class(module, {id(own[name]): name for name in names if name not in found})
    return {name: value for name, value in found.items() if value.shape == own[name].shape}


@contextmanager
def seeded_draws(seed: int) -> Iterator[None]:
    """What is drawn on the CPU, by torch, numpy or Python, follows from ``seed``, and differs from what
    ``torch.manual_seed(seed)`` gives: a model that was made with the same seed is not made again."""
    pythons, numpys = random.getstate(), np.random.get_state()
    own = int(np.random.SeedSequence([seed, _OWN]).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(own)
        random.seed(own)
        np.random.seed(own)
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def _factory(source: str | None, fresh: Fresh | None, trust: bool) -> Fresh | None:
    if fresh is not None and not callable(fresh):
        raise UsageError(f"fresh= is a new model or a function that makes one, not {fresh!r}")
    if fresh is not None or source is None:
        return fresh
    architecture = catalogue.canonical(source)
    return lambda: catalogue.build(architecture, trust=trust)


def _build(make: Fresh | None, module: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters of a newly built model, in the shapes of ``own`` where there are any of that name."""
    if make is None or isinstance(make, nn.Module):
        return {} if make is None else _values(make)
    order: list[tuple[nn.Module, str]] = []

    def note(layer: nn.Module, key: str, _: nn.Parameter) -> None:
        order.append((layer, key))

    with _registering(note):
        built = make()
    if not isinstance(built, nn.Module):
        raise UsageError(f"the function passed as fresh= must return a module, not {built!r}")
    values = _values(built)
    if all(values[name].shape == parameter.shape for name, parameter in own.items() if name in values):
        return values
    paths = {id(layer): path for path, layer in reversed(list(built.named_modules(remove_duplicate=False)))}
    places = iter([(paths.get(id(layer)), key) for layer, key in order])

    def resize(layer: nn.Module, key: str, parameter: nn.Parameter) -> nn.Parameter | None:
        path, expected = next(places, (None, None))
        if key != expected:
            raise UsageError("what is passed as fresh= must build the same model each time")
        edited = None if path is None else own.get(f"{path}.{key}" if path else key)
        if edited is None or edited.shape == parameter.shape:
            return None
        _take_sizes(layer, module.get_submodule(path or ""))
        unwritten = torch.full(edited.shape, torch.nan, dtype=parameter.dtype)
        return nn.Parameter(unwritten, requires_grad=parameter.requires_grad)

    with _registering(resize):
        resized = _values(make())
    drawn = {name: _resample(values[name], value.shape) for name, value in resized.items() if _has_unwritten(value)}
    return resized | drawn


@contextmanager
def _registering(hook: Callable[[nn.Module, str, nn.Parameter], nn.Parameter | None]) -> Iterator[None]:
    """``hook`` is called with each parameter that any module registers, and may replace it."""
    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}


def _take_sizes(layer: nn.Module, edited: nn.Module) -> None:
    """Let a layer under construction know the sizes of the edited one: some initialisers read ``out_channels``."""
    sizes = vars(layer)
    sizes.update({k: v for k, v in vars(edited).items() if k in sizes and type(v) in (int, tuple)})


def _has_unwritten(value: Tensor) -> bool:
    """Whether no initialiser wrote all of a parameter: its value was given to it as it was made."""
    return bool(value.isnan().any())


def _resample(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Entries of ``value`` in a random order, without repetition as far as there are enough."""
    flat, count = value.flatten(), torch.Size(shape).numel()
    if count == 0 or bool((flat == flat[0]).all()):
        return flat[:1].expand(count).reshape(shape).clone()
    index = torch.randperm(len(flat))[:count] if count <= len(flat) else torch.randint(len(flat), (count,))
    return flat[index].reshape(shape)


def _counterpart(name: str, built: dict[str, Tensor], steps: Sequence[Step]) -> str:
    """The name in the source of the parameter that ``name`` is a copy of, through any number of copies."""
    for new in (new for step in reversed(steps) for new in step.inserted()):
        if name not in built and new.like and name.startswith(f"{new.name}."):
            name = new.like + name.removeprefix(new.name)
    return name


def _by_class(module: nn.Module, wanted: dict[int, str]) -> dict[str, Tensor]:
    """Parameters, by id, as ``reset_parameters`` of their layers and of the modules around these draws them.

    It is called on twins without data but for what is wanted, innermost first, as constructors do. What it leaves
    unwritten is left out, and what it cannot draw without data.
    """
    blanks: dict[int, nn.Parameter] = {}
    twins: dict[int, nn.Module] = {}

    def blank(parameter: nn.Parameter) -> nn.Parameter:
        real = id(parameter) in wanted and parameter.is_floating_point()
        drawn = torch.full(parameter.shape, torch.nan) if real else parameter.detach().to("meta")
        return blanks.setdefault(id(parameter), nn.Parameter(drawn, requires_grad=False))

    def draw(made: nn.Module, reset: Callable[[], Any]) -> None:
        try:
            reset()
        except RuntimeError:  # it computes with data that the twin does not have
            for parameter in made.parameters():
                if not parameter.is_meta:
                    parameter.data.fill_(torch.nan)

    def twin(layer: nn.Module) -> nn.Module:
        if id(layer) not in twins:
            made = twins[id(layer)] = object.__new__(type(layer))
            made.__dict__.update(layer.__dict__)
            made.__dict__["_parameters"] = {k: None if p is None else blank(p) for k, p in layer._parameters.items()}
            made.__dict__["_buffers"] = {k: None if b is None else b.to("meta") for k, b in layer._buffers.items()}
            made.__dict__["_modules"] = {k: None if m is None else twin(m) for k, m in layer._modules.items()}
            reset: Any = getattr(made, "reset_parameters", None) or getattr(made, "_reset_parameters", None)
            if reset is not None:
                draw(made, reset)
        return twins[id(layer)]

    if not wanted:
        return {}
    twin(module)
    drawn = {name: blanks[key].detach() for key, name in wanted.items()}
    return {name: value for name, value in drawn.items() if not (value.is_meta or _has_unwritten(value))}
