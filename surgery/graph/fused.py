"""torch's fused inference paths, which read the tensors of the parts of a Transformer and do not call them.

In evaluation, without gradients, `torch.nn.TransformerEncoderLayer` calls one kernel, and `torch.nn.TransformerEncoder`
packs padded sequences into nested tensors, which it returns with zeros at the padded positions. Neither knows of parts
that were traced, edited or switched off. A copy that is worked on computes as torch does with gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def avoid_fused_paths(model: nn.Module) -> None:
    """Let the Transformer encoders in ``model`` call their parts, whatever the mode."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # a condition of the kernel
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


@contextmanager
def warning_of_padding(model: nn.Module, fused: frozenset[str]) -> Iterator[None]:
    """Warn of encoders that are called with padding while this is entered, and that zero it without gradients.

    Args:
        model: a copy that avoids the fused paths.
        fused: the encoders that do not in the original (`padding_encoders`).
    """
    padded: dict[str, None] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None) is not None:
                padded[path] = None

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in sorted(fused)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for path in padded:
        where = repr(path) if path else type(model).__name__
        warnings.warn(
            f"{where} returns zeros at padded positions in evaluation without gradients, and the traced module what it "
            "returns with gradients: the outputs there differ (enable_nested_tensor=False makes the model do the same)",
            stacklevel=4,
        )


def padding_encoders(model: nn.Module) -> frozenset[str]:
    """Paths of the encoders in ``model`` that zero padded positions where nothing needs gradients."""
    return frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        and module.use_nested_tensor
        and bool(getattr(module.layers[0], "activation_relu_or_gelu", False))
    )
