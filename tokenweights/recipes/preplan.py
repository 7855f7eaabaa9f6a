"""The preplan-and-anchor rule: tokens that look far back, and tokens that later ones look back at.

Where local heads turn from near to far, a chunk of text begins that has been planned; where the
global heads of later tokens keep looking back, an anchor stands (arXiv 2510.13554).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights.masked import require_finite
from tokenweights.partition import random_fraction
from tokenweights.recipes.backward import BackwardDistance, FutureInfluence
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import (
    Part,
    Signal,
    columns_of,
    decimal,
    label,
    part_lines,
    require_numbers,
)
from tokenweights.recipes.rules import two_weights
from tokenweights.selection import select

Group = dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class PreplanAnchor(Part):
    """A larger weight for preplan tokens and anchors of each response.

    Preplan tokens have the largest change of the backward distance to the next token, anchors the
    largest future influence. Coupled, only anchors are credited, and one that looks back no far
    itself passes a share of its credit to the preplan token just before it.

    Attributes:
        distance: Backward distance of each token.
        influence: Future influence of each token.
        chosen: `"both"` sets, `"preplan"` tokens, `"anchors"`, or anchors `"coupled"`.
        fraction: Share of a response in either set.
        boost: Weight of the chosen tokens; that of the others is 1.
        passed: Share of an anchor's credit, its weight above 1, that the preplan token gets.
        reach: Tokens before an anchor among which the preplan token is looked for.
        near: Share of a response that looks back least far, of which such an anchor has to be.
    """

    kind: ClassVar[str] = "preplan_anchor"
    scope: ClassVar[str] = "response"
    scored: ClassVar[bool] = False
    distance: Signal = BackwardDistance()  # noqa: RUF009 - a frozen record
    influence: Signal = FutureInfluence()  # noqa: RUF009 - a frozen record
    chosen: Literal["both", "preplan", "anchors", "coupled"] = "both"
    fraction: float = 0.4
    boost: float = 1.5
    passed: float = 0.5
    reach: int = 3
    near: float = 0.5

    def _check(self) -> None:
        self.require_number("fraction", "passed", "near", least=0, most=1)
        self.require_number("boost", least=1)
        self.require("reach", self.reach >= 1, ">= 1")

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of both sets."""
        mask = batch.mask
        far, influence = (self._scores(each, batch) for each in (self.distance, self.influence))
        change = next_changes(far, mask)
        top = {"side": "top", "fraction": self.fraction, "sample_ids": batch.sample_ids}
        preplan, anchors = select(change, mask, **top), select(influence, mask, **top)
        if self.chosen != "coupled":
            sets = {"both": preplan | anchors, "preplan": preplan, "anchors": anchors}
            return two_weights(sets[self.chosen], mask, inside=self.boost, outside=1.0)
        near = select(far, mask, side="bottom", fraction=self.near, sample_ids=batch.sample_ids)
        planned = planners(change, preplan, anchors & near, mask, reach=self.reach)
        credit = anchors.double()
        passing = planned >= 0
        credit -= self.passed * passing
        credit.scatter_add_(1, planned.clamp_min(0), self.passed * passing.double())
        # A token that plans for several anchors, or is one itself, has the credit of one.
        weights = 1.0 + (self.boost - 1.0) * credit.clamp(max=1.0)
        return torch.where(mask, weights, 0.0).float()

    def _scores(self, signal: Signal, batch: RolloutBatch) -> Tensor:
        batch.require(columns_of(signal), caller=self.kind)
        scores = signal(batch)
        require_finite(label(signal), "scores", scores, batch.mask)
        return scores

    def lines(self) -> list[str]:
        """The sets and their weights."""
        share, boost = f"{decimal(100 * self.fraction)}%", decimal(self.boost)
        who = {
            "both": "preplan tokens and anchors",
            "preplan": "preplan tokens",
            "anchors": "anchors",
            "coupled": "anchors",
        }[self.chosen]
        passing = (
            f"{decimal(100 * self.passed)}% of the credit of an anchor in the lowest "
            f"{decimal(100 * self.near)}% by d",
            f"goes to a preplan token up to {self.reach} before it",
        )
        return [
            f"w = {boost} for {who}, else 1",
            f"preplan: top {share} of a response by |d[t] - d[t + 1]|",
            f"anchors: top {share} of a response by f",
            *(passing if self.chosen == "coupled" else ()),
            *(f"d: {line}" for line in part_lines(self.distance)),
            *(f"f: {line}" for line in part_lines(self.influence)),
        ]


@dataclass(frozen=True, kw_only=True)
class RandomCredit(Part):
    """A larger weight for a random share of each response, by `(seed, sample id, position)`.

    Attributes:
        fraction: Share of a response.
        boost: Weight of the drawn tokens; that of the others is 1.
        seed: Of the draw.
    """

    kind: ClassVar[str] = "random_credit"
    scope: ClassVar[str] = "response"
    scored: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    fraction: float = 0.4
    boost: float = 1.5
    seed: int = 0

    def _check(self) -> None:
        self.require_number("fraction", least=0, most=1)
        self.require_number("boost", least=1)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of the draw."""
        require_numbers(self, batch, group)
        keys = {"seed": self.seed, "sample_ids": batch.sample_ids}
        drawn = random_fraction(batch.mask, fraction=self.fraction, **keys)
        return two_weights(drawn, batch.mask, inside=self.boost, outside=1.0)

    def lines(self) -> list[str]:
        """Share, weight and seed."""
        share = f"{decimal(100 * self.fraction)}%"
        boost = decimal(self.boost)
        return [f"w = {boost} for a random {share} of each response, else 1; seed {self.seed}"]


def next_changes(values: Tensor, mask: Tensor) -> Tensor:
    """How much each valid value differs from the next valid one of its row; 0 at the last."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    ordered = torch.where(mask, values, 0.0).gather(1, order)
    change = torch.zeros_like(ordered)
    change[:, :-1] = (ordered[:, :-1] - ordered[:, 1:]).abs()
    valid = mask.gather(1, order)
    valid = valid & torch.nn.functional.pad(valid[:, 1:], (0, 1))
    return torch.zeros_like(change).scatter(1, order, torch.where(valid, change, 0.0))


def planners(
    change: Tensor, preplan: Tensor, anchors: Tensor, mask: Tensor, *, reach: int
) -> Tensor:
    """Column of the preplan token that an anchor passes credit to, -1 where there is none.

    Of those among the `reach` valid tokens before it, the one of the largest change; of equal ones
    the nearest.
    """
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    height = torch.where(preplan, change, -1.0).gather(1, order)
    anchors = anchors.gather(1, order)
    best, place = torch.full_like(height, -1.0), torch.full_like(order, -1)
    for back in range(1, min(reach, height.shape[1] - 1) + 1):
        before = torch.nn.functional.pad(height[:, :-back], (back, 0), value=-1.0)
        column = torch.nn.functional.pad(order[:, :-back], (back, 0), value=-1)
        higher = anchors & (before > best)
        best, place = best.where(~higher, before), place.where(~higher, column)
    return torch.full_like(place, -1).scatter(1, order, place)


ALL: tuple[type[Part], ...] = (PreplanAnchor, RandomCredit)
