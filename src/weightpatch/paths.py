"""Path patching: what a patched supplier does to one target, directly and through everything between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.engine.edges import Receives, direct, is_parallel, is_upstream
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.localization import deliver, reaches, targets_of
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import check_target, contrasted, inputs, reference
from weightpatch.residuals import tokens_per_call
from weightpatch.statistics import recovery

if TYPE_CHECKING:
    import pandas as pd

ANCHOR = "anchor"
"""The target that stands for the anchor itself: what suppliers write there without any detour."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges:
    """Direct edges from suppliers into one target.

    Attributes:
        suppliers: What was patched, upstream of the target.
        target: Address of the target, or `anchor`.
        receives: Which of the target's inputs saw the suppliers.
        per_prompt: What the target then writes more along the anchor's direction at the readout positions, shape
            `(supplier, prompt)`, float64, in the readout's unit.
        gap: Specialized minus base readout of the anchor, shape `(prompt,)`.
        target_gap: What the target writes more in the specialized model, same shape; for the anchor, `gap`.
        queries: The base query of each prompt.
    """

    suppliers: tuple[Component, ...]
    target: str
    receives: Receives
    per_prompt: Tensor
    gap: Tensor
    target_gap: Tensor
    queries: tuple[str, ...]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each supplier.

        Returns:
            Columns supplier, target, direct (share of the anchor's gap, ratio of means), ci_low and ci_high (bootstrap
            95 % interval over queries), of_target (share of the target's own gap; NaN where that is 0).

        Raises:
            NoGapError: the two models do not differ measurably in the readout.
        """
        import pandas as pd

        share = recovery(self.per_prompt.numpy(), self.gap.numpy(), groups=self.queries, seed=seed)
        own = float(self.target_gap.mean())
        effect = self.per_prompt.mean(dim=1).numpy()
        return pd.DataFrame(
            {
                "supplier": [str(one) for one in self.suppliers],
                "target": self.target,
                "direct": share.ratio,
                "ci_low": share.low,
                "ci_high": share.high,
                "of_target": effect / own if own else float("nan"),
            }
        )


def direct_effects(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    suppliers: str | Sequence[str | Component],
    target: str | Component,
    receives: Receives = "all",
    method: Literal["exact", "activation"] = "exact",
    batch_tokens: int | None = None,
) -> Edges:
    """Patch suppliers and let only the target see it: everything between them stays what it is in the base.

    The target's sublayer is called on the base's residual stream plus what the supplier's sublayer then adds to it at
    every token, norms in front of it included. Costs one call of that sublayer for many suppliers at once. Total
    effects, through everything between, come from `localize(..., targets=...)`.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: A projection; says along what, and where, the target's write is read.
        suppliers: Units and addresses; those that do not lie upstream of the target are left out.
        target: A head, an attention, an MLP, a neuron, or `"anchor"`.
        receives: Which of an attention's inputs see the supplier: `all`, or `q`, `k` or `v` alone.
        method: What is patched in suppliers: their weights (`exact`), or what they put out (`activation`).
        batch_tokens: Most tokens of one call; None: as many as suit the model and its device.

    Raises:
        ComponentError: an unknown address, a target that writes nothing, or no supplier upstream of it.
        AnchorError: the anchor does not fit, is no projection, or the target lies at or past it.

    Source:
        Path patching: Goldowsky-Dill et al. 2023 (arXiv:2304.05969), Wang et al. 2023 (arXiv:2211.00593); suppliers
        patched by weights, and the target's write along the anchor as what is read, are ours, after the
        supplier-target tracing of Sun et al. 2026 (arXiv:2604.13694).
    """
    upstream, per_prompt = direct_changes(
        pair,
        prompts,
        anchor,
        suppliers=suppliers,
        target=target,
        receives=receives,
        method=method,
        batch_tokens=batch_tokens,
    )
    base, specialized = reference(pair, prompts, anchor)
    own = gap = specialized - base
    if str(target) != ANCHOR:
        delivered = deliver(pair, prompts, anchor, [Component.parse(str(target))], batch_tokens=batch_tokens)
        own = delivered[1, 0] - delivered[0, 0]
    return Edges(
        suppliers=upstream,
        target=str(target),
        receives=receives,
        per_prompt=per_prompt,
        gap=gap,
        target_gap=own,
        queries=tuple(row.query for row in prompts),
    )


def direct_changes(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    suppliers: str | Sequence[str | Component],
    target: str | Component,
    receives: Receives = "all",
    method: Literal["exact", "activation"] = "exact",
    batch_tokens: int | None = None,
) -> tuple[tuple[Component, ...], Tensor]:
    """What `direct_effects` measures, for who knows the gaps already. Arguments and errors as there.

    Returns:
        The suppliers that lie upstream, and what the target then writes more, `(supplier, prompt)`, float64.
    """
    if method not in ("exact", "activation"):
        raise ComponentError(f"edges are measured by exact or activation, not by {method!r}: choose one of these.")
    check_target(pair, prompts, anchor)
    ending = None if str(target) == ANCHOR else Component.parse(str(target))
    read = targets_of(pair, anchor, [ending] if ending else "embed")
    if ending and (not read or ending.unit not in ("heads", "attns", "mlps", "neurons")):
        raise AnchorError(
            f"{ending} cannot be the target of an edge: name a head, an attention, an MLP or a neuron below the "
            f"anchor (layer {anchor.layer}), or {ANCHOR!r}."
        )
    token_ids = inputs(pair, prompts, anchor)
    parallel = is_parallel(pair, token_ids, anchor)
    upstream = [
        one
        for one in components(pair.architecture, suppliers)
        if reaches(one, anchor) and is_upstream(one, ending, is_parallel=parallel)
    ]
    if not upstream:
        raise ComponentError(f"none of {suppliers} lies upstream of {target}. Name components of lower layers.")
    found = direct(
        pair,
        token_ids,
        anchor,
        upstream,
        ending,
        direction=anchor.direction,
        receives=receives,
        source="activations" if method == "activation" else "weights",
        batch_tokens=batch_tokens or tokens_per_call(pair.base),
    )
    return tuple(upstream), contrasted(torch.stack([change for _, change in found]), anchor)
