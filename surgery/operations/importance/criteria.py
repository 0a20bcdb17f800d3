"""The criteria that look at weights alone."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from surgery.graph.rule_table import rule_of_class
from surgery.operations.importance.registry import Scores, importance
from surgery.operations.importance.scored import Scored


@importance("prefix", across="never")
def prefix(scored: Scored) -> Scores:
    """All alike, so that the first are kept: KELS (Taha, Shrivastava, Davis, CVPR 2021, section 3)."""
    return np.zeros(scored.group.units)


@importance("magnitude", across="raw")
def magnitude(scored: Scored) -> Scores:
    """DepGraph's group importance with the L2 norm (Fang et al., CVPR 2023, section 3.3): the squared weights that go
    with a unit, in every parameter of the group and in units of their mean over the units, averaged over the
    parameters."""
    scores = np.zeros(scored.group.units)
    for one in scored.slices:
        found = one.sum(one.squares)
        if found.mean() > 0:
            scores += found / found.mean() / len(scored.group.members)
    return scores


@importance("random", across="raw")
def random(scored: Scored) -> Scores:
    """Uniform in [0, 1), by the seed and the group's name: what other criteria should be better than."""
    generator = np.random.default_rng([scored.seed, zlib.crc32(scored.group.name.encode())])
    return generator.random(scored.group.units)


@importance("bn-scale", across="raw")
def bn_scale(scored: Scored) -> Scores:
    """The absolute factors of the norms of the group, a mean over them (Network Slimming: Liu et al., ICCV 2017,
    section 3, which trains with an L1 penalty on these factors first). Norms of any kind count."""
    found = [
        one
        for one in scored.slices
        if one.member.name.endswith("weight")
        and one.tensor.ndim == 1
        and (layer := scored.layer(one.member)) is not None
        and rule_of_class(layer).norm
    ]
    if not found:
        return scored.instead("magnitude", "no norm with factors goes with it")
    total = sum(one.sum(np.abs(one.weight[:, 0])) for one in found)
    places = sum(one.sum(np.ones(len(one.units))) for one in found)
    return np.asarray(total / np.maximum(places, 1))


@importance("fpgm", across="mean")
def fpgm(scored: Scored) -> Scores:
    """The sum of a filter's distances to all other filters of its layer (He et al., CVPR 2019, section 3.3): the
    smaller, the nearer it is to their geometric median. In units of the mean of each layer that writes the group,
    averaged over these layers."""
    scores, held = np.zeros(scored.group.units), np.zeros(scored.group.units)
    for one in scored.filters:
        rows = torch.from_numpy(one.weight)
        distances = torch.cdist(rows, rows).fill_diagonal_(0.0).sum(1).numpy()
        if distances.mean() > 0:
            scores += one.sum(distances / distances.mean())
        held += one.sum(np.ones(len(distances)))
    if not held.all():
        return scored.instead("magnitude", "not all of it is written by rows of weights")
    return scores / held


@importance("lamp", across="raw")
def lamp(scored: Scored) -> Scores:
    """Of each layer that writes the group, a unit's squared weights over the sum of those of all units that have no
    smaller ones; averaged over the layers. LAMP scores (Lee et al., ICLR 2021, equation 1) of units in the place of
    single weights; made to be ranked globally."""
    scores, held = np.zeros(scored.group.units), np.zeros(scored.group.units)
    for one in scored.filters:
        inside = one.sum(np.ones(len(one.units))) > 0
        squares = one.sum(one.squares)[inside]
        order = np.argsort(squares, kind="stable")
        ascending = squares[order]
        rest = np.cumsum(ascending[::-1])[::-1]
        own = rest[np.searchsorted(ascending, squares, side="left")]
        scores[inside] += np.divide(squares, own, out=np.zeros(len(own)), where=own > 0)
        held += inside
    if not held.all():
        return scored.instead("magnitude", "not all of it is written by rows of weights")
    return scores / held
