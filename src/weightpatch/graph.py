"""A trace as a graph: components with their roles, and who supplies, relays, delivers and executes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from weightpatch.paths import ANCHOR
from weightpatch.roles import Role
from weightpatch.stability import Overlap

Kind = Literal["supplies", "relays", "delivers", "executes"]
"""What an edge says: a supplier's weights change what its target writes; a router changes what another one writes; a
component's own write reaches the anchor; a component past the anchor turns it into output."""

OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share with its bootstrap 95 % interval over queries; None where it is unknown."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A component of the graph, the anchor or the output.

    Attributes:
        component: Address, `anchor` or `output`.
        role: Its role; None for the last two.
        layer: Its layer; the anchor's; None for the output and the embedding.
        recovery: By its weights alone; None past the anchor, and for what was not patched by itself.
        activation: By activation patching; None likewise.
        loss: What the steered behaviour loses without it; past the anchor only.
    """

    component: str
    role: Role | None
    layer: int | None
    recovery: float | None = None
    activation: float | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From a supplier to a target.

    Attributes:
        source: Address of the supplier.
        target: Address of the target, `anchor` or `output`.
        kind: What it says.
        total: Through everything between, as a share of the target's own gap between base and specialized model (of
            the anchor's gap where the anchor is the target; of R where it is the output).
        direct: Where only the target sees the supplier; None where that was not measured.
    """

    source: str
    target: str
    kind: Kind
    total: Share | None
    direct: Share | None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step backwards.

    Attributes:
        targets: Whose suppliers were looked for.
        suppliers: Those found, the largest first.
        joint: What all of them, patched together, restore of what the targets write.
        n_candidates: Components that were estimated.
        n_exact: Those of them that were patched.
        stopped: Why it ends here; None if the suppliers were traced further.
    """

    targets: tuple[str, ...]
    suppliers: tuple[str, ...]
    joint: Share | None
    n_candidates: int
    n_exact: int
    stopped: str | None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Who supplies whom, from sources to the output.

    Attributes:
        nodes: In the order of layers.
        edges: The largest first within each kind.
        rounds: How it was found.
        overlaps: Suppliers of the first round's targets against the components with the largest effects of weights.
        control: The same for as many components of the same kind and layers that are no routers; empty where there
            are none.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    rounds: tuple[Round, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    control: tuple[Overlap, ...] = ()

    def of_role(self, role: Role) -> tuple[Node, ...]:
        """The nodes of one role."""
        return tuple(node for node in self.nodes if node.role == role)

    def record(self) -> dict[str, Any]:
        """The graph as JSON takes it: `nodes`, `edges`, `rounds`, `overlaps`, `control`."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Graph:
        """What `record` gave."""
        share = _share
        return cls(
            nodes=tuple(Node(**node) for node in record["nodes"]),
            edges=tuple(
                Edge(**{**edge, "total": share(edge["total"]), "direct": share(edge["direct"])})
                for edge in record["edges"]
            ),
            rounds=tuple(
                Round(
                    **{
                        **one,
                        "targets": tuple(one["targets"]),
                        "suppliers": tuple(one["suppliers"]),
                        "joint": share(one["joint"]),
                    }
                )
                for one in record["rounds"]
            ),
            overlaps=tuple(Overlap(**one) for one in record["overlaps"]),
            control=tuple(Overlap(**one) for one in record["control"]),
        )

    def save_graphml(self, path: str | Path) -> None:
        """Write it for Gephi, yEd, Cytoscape or networkx; attributes that are unknown are left out."""
        import networkx

        graph = networkx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.component, **_known({**asdict(node), "role": node.role or node.component}))
        for edge in self.edges:
            shares = {
                name if part == "value" else f"{name}_{part}": number
                for name, share in (("total", edge.total), ("direct", edge.direct))
                for part, number in (asdict(share) if share else {}).items()
            }
            graph.add_edge(edge.source, edge.target, **_known({"kind": edge.kind, **shares}))
        networkx.write_graphml(graph, str(path))


def _share(record: Mapping[str, Any] | None) -> Share | None:
    return None if record is None else Share(**record)


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None and name != "component"}


def nodes_in_order(nodes: Sequence[Node], last: int) -> tuple[Node, ...]:
    """Nodes from the bottom of the model to its output.

    Args:
        nodes: In any order.
        last: The anchor's layer.
    """

    def place(node: Node) -> tuple[float, str]:
        if node.component == OUTPUT:
            return float("inf"), ""
        if node.component == ANCHOR:
            return last - 0.5, ""
        return (-1.0 if node.layer is None else float(node.layer)), node.component

    return tuple(sorted(nodes, key=place))
