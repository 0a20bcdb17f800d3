"""Published weights, put into the architecture that is asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import UsageError, WeightsWarning, unknown_name
from surgery.models.catalogue import FROZEN_NORM, Entry
from surgery.models.sources import Source, published


def build(source: Source, entry: Entry, name: str, call: Callable[[Source, Mapping[str, Any]], nn.Module]) -> nn.Module:
    """Build a source with published weights; ``call`` calls a builder with keywords.

    torchvision's builder makes the donor, since some families rename the entries of their files on loading.
    """
    known = published(source.name)
    if name not in known.__members__:
        raise unknown_name(f"weights of {source.name!r}", name, known.__members__)
    chosen = known[name]
    _fetch(source.name, chosen)
    keywords = {**source.implied(), **source.keywords}
    of_donor = {k: v for k, v in keywords.items() if k not in ("num_classes", FROZEN_NORM)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="auxiliary heads in the pretrained")
        donor = call(source, {**of_donor, "weights": chosen, "progress": False})
    classes = len(chosen.meta.get("categories", ()))
    if keywords.get("num_classes", classes) == classes:
        return donor
    module = call(source, {**entry.defaults, **keywords})
    skipped = _copy_matching(donor, module)
    if skipped:
        warnings.warn(
            f"{source.name}: the published weights do not fit, and initial values stay, in: {', '.join(skipped)}",
            WeightsWarning,
            stacklevel=4,
        )
    return module


def _fetch(name: str, chosen: Any) -> None:
    """Put the file of the weights into torch's hub cache, where torchvision's builder then finds it."""
    url = cast(str, chosen.url)
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = file.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, no such file, no space; another file than was published
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"cannot fetch the weights of {name!r} from {url} ({reason}): pass weights none, or put the file at {file}"
        ) from error


def _copy_matching(donor: nn.Module, module: nn.Module) -> list[str]:
    """Copy each entry whose shape fits, and its `requires_grad`; return the names of the entries left as they were."""
    given = donor.state_dict()
    own = module.state_dict()
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(fitting, strict=False)
    trained = {k: p.requires_grad for k, p in donor.named_parameters()}
    for name, parameter in module.named_parameters():
        if name in fitting:
            parameter.requires_grad_(trained[name])
    return [k for k in own if k not in fitting]
