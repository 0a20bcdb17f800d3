"""`RemoveBlock`: a block is taken out, and what it was added to is handed on: the inverse of `InsertBlock`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.edit.blocks import Block, block_between, block_of, branch_of
from surgery.edit.flow import Flow
from surgery.edit.sites import Site, local_name, output_sites
from surgery.edit.step import Step
from surgery.errors import EditError
from surgery.graph.traced import TracedModule


@dataclass(frozen=True)
class Removal:
    """A block in a graph that runs it. Without it, those who read its end read its entry."""

    site: Site
    block: Block

    def zero_names(self) -> tuple[str, ...]:
        """Qualified names of what is 0 where the end equals the entry."""
        return tuple(sorted(f"{self.site.path}.{z.holder}.{z.tensor}".strip(".") for z in self.block.zeros))


@dataclass(frozen=True)
class RemoveBlock(Step):
    """Remove a block: the result is the network in which the block's last layers are 0.

    A block whose skip connection has layers of its own, which change the size or the number of channels, keeps these.

    Attributes:
        name: qualified name of the container that is the block.
        zeros: qualified names of its tensors that the result takes for 0, within this block: what is tied to them
            elsewhere stays.
    """

    name: str
    zeros: tuple[str, ...]

    def apply(self, module: nn.Module) -> nn.Module:
        """See `Step.apply`."""
        return self.apply_in_place(copy.deepcopy(module))

    def apply_in_place(self, module: nn.Module) -> nn.Module:
        """See `Step.apply_in_place`."""
        removals = find_removals(module, analyse(module), self.name)
        if any(removal.zero_names() != self.zeros for removal in removals):
            raise EditError(f"{self.name!r} adds more than nothing where {list(self.zeros)} are 0")
        before = {id(r.site.owner): _targets(r.site.owner) for r in removals}
        for removal in removals:
            _remove(removal.site.graph, removal.block)
        for owner, path in {id(r.site.owner): (r.site.owner, r.site.path) for r in removals}.values():
            _forget(owner, before[id(owner)], local_name(self.name, path))
            owner.recompile()
        return module

    def describe(self) -> str:
        """See `Step.describe`."""
        return f"RemoveBlock: {self.name!r}"


def find_removals(module: nn.Module, analysis: Analysis, name: str) -> list[Removal]:
    """How each graph that runs a block does without it.

    Raises:
        UsageError: no such container.
        EditError: it is no block: nothing in it hands on what it is given where other layers are 0.
    """
    found = []
    for site in output_sites(module, name):
        flow, local = Flow(analysis, site), local_name(name, site.path)
        if local:
            block = block_of(flow, site.node, local)
        else:  # a traced part of its own
            block = block_between(flow, next(iter(site.graph.nodes)), site.node)
        block = block or branch_of(flow, site.node, local)
        if block is None:
            raise EditError(
                f"{name!r} is not a block: that takes a skip connection, to which nothing but layers whose last one "
                "can be 0 is added"
            )
        found.append(Removal(site, block))
    return found


def removal_step(module: nn.Module, analysis: Analysis, name: str) -> RemoveBlock:
    """The step that removes a block.

    Raises:
        UsageError, EditError: as `find_removals` does; or the block ends in other layers in training.
    """
    zeros = {removal.zero_names() for removal in find_removals(module, analysis, name)}
    if len(zeros) != 1:
        raise EditError(f"{name!r} ends in other layers in training than in evaluation")
    return RemoveBlock(name, zeros.pop())


def _targets(owner: TracedModule) -> set[str]:
    return {str(n.target) for graph in owner.graphs for n in graph.nodes if n.op in ("call_module", "get_attr")}


def _remove(graph: fx.Graph, block: Block) -> None:
    going = {*block.nodes, block.end}
    for node in graph.nodes:  # and what reads them, such as sizes that nobody needs
        if any(n in going and n is not block.end for n in node.all_input_nodes):
            going.add(node)
    block.end.replace_all_uses_with(block.entry)
    for node in reversed(list(graph.nodes)):
        if node in going and not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    graph.lint()


def _forget(owner: TracedModule, before: set[str], local: str) -> None:
    """Remove the layers and parameters that no graph reads any more, and the container if nothing in it is read."""
    after = _targets(owner)
    if local and not any(f"{target}.".startswith(f"{local}.") for target in after):
        _delete(owner, local)
        return
    for target in before - after:
        if not any(other.startswith(f"{target}.") for other in after):
            _delete(owner, target)


def _delete(owner: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    holder = owner.get_submodule(parent)
    if hasattr(holder, child):
        delattr(holder, child)
