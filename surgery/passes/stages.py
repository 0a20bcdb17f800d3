"""Which container of a stage is a block: a stage is a row of blocks that are alike, and the last is to be copied."""

from __future__ import annotations

from torch import fx

from surgery.passes.blocks import Block, Flow


def find_block(flow: Flow, end: fx.Node, name: str) -> tuple[str, Block] | None:
    """The block at the end of a container, and the container that is exactly that block: the outermost one that is no
    row of such containers. Its name is empty where there is none, and the smallest block is taken."""
    found = list(flow.blocks(end, name))
    back = flow.before(end)
    within: str | None = name
    while within is not None and found:
        filled = flow.inside(within) & back
        block = next((b for b in found if filled == set(b.nodes) & set(flow.operations)), None)
        chain, parts = _parts(flow, within)
        if block is not None and not _is_row(flow, parts):
            numbered = [n for n in chain if n[-1:].isdigit()]
            like = (numbered or [n for n in chain if n] or [""])[-1 if numbered else 0]
            if like:
                return like, block
        within = next((part for part in parts if end in flow.inside(part)), None)
    return ("", found[0]) if found else None


def block_of(flow: Flow, end: fx.Node, like: str) -> Block | None:
    """The block at ``end`` that is exactly the container ``like``; the smallest one for ``""``."""
    if not like:
        return next(flow.blocks(end), None)
    filled = flow.inside(like) & flow.before(end)
    return next((b for b in flow.blocks(end, like) if filled == set(b.nodes) & set(flow.operations)), None)


def _parts(flow: Flow, name: str) -> tuple[list[str], list[str]]:
    """Containers with the same ops, from ``name`` inwards, and the children of the last that run."""
    chain = [name]
    while True:
        children = [f"{chain[-1]}.{n}".lstrip(".") for n, _ in flow.owner.get_submodule(chain[-1]).named_children()]
        parts = [child for child in children if flow.inside(child)]
        if len(parts) != 1 or flow.inside(parts[0]) != flow.inside(name):
            return chain, parts
        chain.append(parts[0])


def _is_row(flow: Flow, parts: list[str]) -> bool:
    """Whether all of several containers are blocks with parameters of the same shapes."""
    if len(parts) < 2:
        return False
    shapes = [[p.shape for p in flow.owner.get_submodule(part).parameters()] for part in parts]
    if any(other != shapes[0] for other in shapes):
        return False
    ends = [max(flow.inside(part), key=flow.order.__getitem__) for part in parts]
    return all(block_of(flow, end, part) is not None for end, part in zip(ends, parts, strict=True))
