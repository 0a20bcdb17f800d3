"""`RemoveBlock`: a block is taken out, and what it was added to is handed on: the inverse of `InsertBlock`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.edit.blocks import Zero, block_between, block_of, branch_of
from surgery.edit.flow import Flow
from surgery.edit.sites import Site, is_inside, local_name, output_sites
from surgery.edit.step import Step
from surgery.errors import EditError
from surgery.graph.traced import TracedModule


@dataclass(frozen=True)
class Removal:
    """How a graph does without a block: those who read ``end`` read ``instead``, which it equals where ``zeros`` are
    0."""

    site: Site
    end: fx.Node
    instead: fx.Node
    zeros: frozenset[Zero]
    idle: frozenset[fx.Node]
    """Numbers that the block computes and nobody reads, such as sizes."""

    def zero_names(self) -> tuple[str, ...]:
        """Qualified names of what is 0."""
        return tuple(sorted(f"{self.site.path}.{z.holder}.{z.tensor}".strip(".") for z in self.zeros))


@dataclass(frozen=True)
class RemoveBlock(Step):
    """Remove a block: the result is the network in which the block's last layers are 0.

    A block whose skip connection has layers of its own, which change the size or the number of channels, keeps these.

    Attributes:
        name: qualified name of the container that is the block.
        zeros: qualified names of its tensors that the result takes for 0.
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
            _remove(removal, local_name(self.name, removal.site.path))
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
        inside = [n for n in site.graph.nodes if not local or is_inside(n, local)]
        idle = frozenset(n for n in inside if n.op.startswith("call_") and not n.users and not flow.holds_tensors(n))
        if block is not None:
            found.append(Removal(site, block.end, block.entry, block.zeros, idle))
            continue
        branch = branch_of(flow, site.node, local)
        if branch is None:
            raise EditError(
                f"{name!r} is not a block: that takes a skip connection, to which nothing but layers whose last one "
                "can be 0 is added"
            )
        found.append(Removal(site, *branch, idle))
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


def _remove(removal: Removal, local: str) -> None:
    graph = removal.site.graph
    gone, left = {removal.end, *removal.idle}, [removal.end]
    while left:  # what the block is computed by
        for node in left.pop().all_input_nodes:
            if node is not removal.instead and node not in gone and node.op != "placeholder":
                gone.add(node)
                left.append(node)
    removal.end.replace_all_uses_with(removal.instead)
    for node in reversed(list(graph.nodes)):
        if node in gone and not node.users and (not local or node is removal.end or _is_of(node, local)):
            graph.erase_node(node)
    graph.lint()


def _is_of(node: fx.Node, local: str) -> bool:
    return is_inside(node, local) or (node.op == "get_attr" and f"{node.target}.".startswith(f"{local}."))


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
