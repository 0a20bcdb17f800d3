"""Executes `InsertBlock`: a copy of a block, whose last layers are 0, behind it (LLaMA-Pro, ACL 2024)."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from surgery.axes.groups import Analysis, analyse
from surgery.edit.blocks import Block, Flow, Zero, block_of
from surgery.edit.recipe import InsertBlock
from surgery.edit.sites import Site, is_called, local_name, op_of, output_sites
from surgery.errors import EditError


def insert_block(module: nn.Module, step: InsertBlock) -> None:
    """Insert the block of ``step`` into ``module``, in every graph that computes what it reads."""
    found = copied_blocks(module, analyse(module), step.after, step.like)
    if any(zero_names(site, block, step.like, step.name) != step.zeros for site, _, block in found):
        raise EditError(f"a copy of {step.like or step.after!r} is not the identity where {list(step.zeros)} are 0")
    parent, _, child = step.name.rpartition(".")
    container = module.get_submodule(parent)
    if hasattr(container, child):
        raise EditError(f"{step.name!r} is taken")
    memo: dict[int, Any] = {}  # of all that is copied: what is tied in the block is tied in the copy, and to it alone
    new = copy.deepcopy(module.get_submodule(step.like), memo) if step.like else nn.Module().train(container.training)
    container.add_module(child, new)
    names: dict[tuple[str, str], str] = {}
    for site, _, block in found:
        for node in block.nodes:
            target = str(node.target)
            if node.op in ("call_module", "get_attr") and (site.path, target) not in names:
                names[site.path, target] = _copy_part(site, step, target, memo)
    with torch.no_grad():
        for name in step.zeros:
            operator.attrgetter(name)(module).zero_()
    for parameter in new.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for site, end, block in found:
        _insert(site, step, end, block, names)
        site.owner.recompile()


def copied_blocks(module: nn.Module, dims: Analysis, after: str, like: str) -> list[tuple[Site, fx.Node, Block]]:
    """In each graph that computes the output of ``after``: the value that a copy is put behind, and the block that it
    is a copy of.

    ``like`` is a container, all of which is the block. Without it, it is the smallest block at the end of a container,
    or the smallest one that a layer is in.

    Raises:
        EditError: there is none.
    """
    result = []
    known = {id(site.graph): site for site in output_sites(module, like)} if like else {}
    for site in output_sites(module, after):
        flow = Flow(dims, site)
        if like:
            own = known.get(id(site.graph))
            block = None if own is None else block_of(flow, own.node, local_name(like, site.path))
            end = site.node
        else:
            block = _around(flow, site, not is_called(site, after))
            end = site.node if block is None else block.end
        if block is None:
            raise EditError(
                f"{like or after!r} has no block at its end that could be copied: that takes a skip connection, which "
                "nothing but layers whose last one can be 0 is added to"
            )
        result.append((site, end, block))
    return result


def _around(flow: Flow, site: Site, container: bool) -> Block | None:
    """The smallest block that ends at a container's output, or that a layer is in, an activation behind it included."""
    if container:
        return block_of(flow, site.node, "")
    for node in list(flow.order)[flow.order[site.node] :]:
        block = block_of(flow, node, "")
        if block is not None and site.node in block.nodes:
            users = list(node.users)
            if len(users) == 1 and op_of(flow.owner, users[0]).activation:
                return block_of(flow, users[0], "") or block
            return block
    return None


def zero_names(site: Site, block: Block, like: str, name: str) -> tuple[str, ...]:
    """Qualified names of what is 0 in a copy of ``block`` that is called ``name``."""

    def new(zero: Zero) -> str:
        return f"{renamed(site, zero.holder, like, name)}.{zero.tensor}".rstrip(".")

    return tuple(sorted(map(new, block.zeros)))


def renamed(site: Site, target: str, like: str, name: str) -> str:
    """The qualified name, in the copy, of what a node reads or calls."""
    whole = f"{site.path}.{target}".lstrip(".")
    if like and f"{whole}.".startswith(f"{like}."):
        return name + whole[len(like) :]
    return f"{name}.{target.replace('.', '_')}"


def _copy_part(site: Site, step: InsertBlock, target: str, memo: dict[int, Any]) -> str:
    """Copy what a node reads or calls, unless it is in the container that was copied; its name in the graph."""
    found = operator.attrgetter(target)(site.owner)
    inside = bool(step.like) and f"{site.path}.{target}.".lstrip(".").startswith(f"{step.like}.")
    if not inside and not isinstance(found, (nn.Module, torch.Tensor)):
        return target  # a flag or a number: nothing to learn
    name = local_name(renamed(site, target, step.like, step.name), site.path)
    if not inside:
        holder, own = site.owner.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if hasattr(holder, own):
            raise EditError(f"{name!r} is taken")
        twin = copy.deepcopy(found, memo)
        if isinstance(twin, torch.Tensor) and not isinstance(twin, nn.Parameter):
            holder.register_buffer(own, twin)
        else:
            setattr(holder, own, twin)
    return name


def _insert(site: Site, step: InsertBlock, end: fx.Node, block: Block, names: dict[tuple[str, str], str]) -> None:
    users = list(end.users)
    copies = {block.entry: end}
    last = end
    like, name = (local_name(path, site.path) for path in (step.like, step.name))
    for node in block.nodes:
        with site.graph.inserting_after(last):
            last = copies[node] = site.graph.node_copy(node, lambda n: copies.get(n, n))
        if node.op in ("call_module", "get_attr"):
            last.target = names[site.path, str(node.target)]
        path = str(node.meta.get("path", ""))
        inside = like and f"{path}.".startswith(f"{like}.")
        last.meta["path"] = name + path[len(like) :] if inside else name
    for user in users:
        user.replace_input_with(end, copies[block.end])
    site.graph.lint()
