"""Training and scoring under `torch.compile`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from surgery.errors import UsageError

_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
"""Where the errors of compilers are defined; they share no base."""


@contextmanager
def compiling(model: nn.Module, wanted: bool) -> Iterator[nn.Module]:
    """Give what runs ``model`` compiled, with its parameters; the model itself where that is not ``wanted``.

    Raises:
        UsageError: the model cannot be compiled here.
    """
    if not wanted:
        yield model
        return
    import torch._dynamo

    # Models of one class count together. Past the limit dynamo would run the next one as it is, silently.
    with torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        try:
            yield cast(nn.Module, torch.compile(model))
        except Exception as error:
            if not type(error).__module__.startswith(_COMPILERS):
                raise
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"the model cannot be compiled here ({said}): install a C++ compiler or what else is missing, or "
                "leave out compile"
            ) from error
