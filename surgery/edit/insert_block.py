"""`InsertBlock`: a copy of a block, whose last layers are 0, behind it (LLaMA-Pro, ACL 2024)."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.edit.blocks import Block, Zero, block_of
from surgery.edit.flow import Flow
from surgery.edit.sites import Site, is_called, local_name, op_of, output_sites, place_for
from surgery.edit.step import Inserted, Step
from surgery.errors import EditError


@dataclass(frozen=True)
class InsertBlock(Step):
    """Insert a copy of a block behind it, whose last layers are 0, so that it hands on what it is given (LLaMA-Pro, ACL
    2024).

    Attributes:
        after: qualified name of the container behind whose output the copy stands; of a layer in the block, where no
            container is the block.
        name: qualified name of the copy.
        like: qualified name of the container that is copied; empty where none is the block. Then it is the smallest
            block at the end of ``after``, or that ``after`` is in.
        zeros: qualified names of the copy's tensors that are 0.
    """

    after: str
    name: str
    like: str
    zeros: tuple[str, ...]

    def apply(self, module: nn.Module) -> nn.Module:
        """Insert the copy in every graph that computes what it reads. See `Step.apply`."""
        return self.apply_in_place(copy.deepcopy(module))

    def apply_in_place(self, module: nn.Module) -> nn.Module:
        """See `Step.apply_in_place`."""
        found = copied_blocks(module, analyse(module), self.after, self.like)
        if any(zero_names(site, block, self.like, self.name) != self.zeros for site, _, block in found):
            raise EditError(f"a copy of {self.like or self.after!r} is not the identity where {list(self.zeros)} are 0")
        memo: dict[int, Any] = {}  # what is tied in the block is tied in the copy, and to it alone
        new = _add_container(module, self, memo)
        names: dict[tuple[str, str], str] = {}
        for site, _, block in found:
            for node in block.nodes:
                target = str(node.target)
                if node.op in ("call_module", "get_attr") and (site.path, target) not in names:
                    names[site.path, target] = _copy_part(site, self, target, memo)
        with torch.no_grad():
            for name in self.zeros:
                operator.attrgetter(name)(module).zero_()
        for parameter in new.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for site, end, block in found:
            _insert(site, self, end, block, names)
            site.owner.recompile()
        return module

    def inserted(self) -> tuple[Inserted, ...]:
        """See `Step.inserted`."""
        return (Inserted(self.name, self.after, self.like),)

    def describe(self) -> str:
        """See `Step.describe`."""
        what = repr(self.like) if self.like else "the block there"
        return f"InsertBlock: a copy {self.name!r} of {what} behind {self.after!r}"


def copied_blocks(module: nn.Module, analysis: Analysis, after: str, like: str) -> list[tuple[Site, fx.Node, Block]]:
    """In each graph that computes the output of ``after``: the value that a copy is put behind, and the block that it
    is a copy of.

    ``like`` is a container that is the block as a whole. Without it, the block is the smallest one at the end of a
    container, or around a layer.

    Raises:
        EditError: there is none.
    """
    result = []
    known = {id(site.graph): site for site in output_sites(module, like)} if like else {}
    for site in output_sites(module, after):
        flow = Flow(analysis, site)
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
        return f"{rename(site, zero.holder, like, name)}.{zero.tensor}".rstrip(".")

    return tuple(sorted(map(new, block.zeros)))


def rename(site: Site, target: str, like: str, name: str) -> str:
    """The qualified name, in the copy, of what a node reads or calls."""
    whole = f"{site.path}.{target}".lstrip(".")
    if like and f"{whole}.".startswith(f"{like}."):
        return name + whole[len(like) :]
    return f"{name}.{target.replace('.', '_')}"


def _add_container(module: nn.Module, step: InsertBlock, memo: dict[int, Any]) -> nn.Module:
    """Register the container of the copy: a copy of the block's own, or an empty one."""
    container, child = place_for(module, step.name)
    new = copy.deepcopy(module.get_submodule(step.like), memo) if step.like else nn.Module().train(container.training)
    container.add_module(child, new)
    return new


def _copy_part(site: Site, step: InsertBlock, target: str, memo: dict[int, Any]) -> str:
    """Copy what a node reads or calls, unless it is in the container that was copied; its name in the graph."""
    found = operator.attrgetter(target)(site.owner)
    inside = bool(step.like) and f"{site.path}.{target}.".lstrip(".").startswith(f"{step.like}.")
    if not inside and not isinstance(found, (nn.Module, torch.Tensor)):
        return target  # a flag or a number: nothing to learn
    name = local_name(rename(site, target, step.like, step.name), site.path)
    if not inside:
        holder, own = place_for(site.owner, name)
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
