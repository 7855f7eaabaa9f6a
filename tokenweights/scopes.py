"""Scopes: the tokens among which a rule ranks, averages or takes extrema, alike on any layout.

A scope is a set of whole responses: one response, all responses to a prompt, or the rollout batch
over all ranks. A sign narrows each to the tokens whose advantage has it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.distributed import gathered, slice_positions
from tokenweights.masked import require_finite

Scope = Literal["response", "prompt", "batch"]
Sign = Literal["any", "positive", "negative"]


@dataclass(frozen=True)
class Segments:
    """Which set of responses each row belongs to.

    Attributes:
        rows: The number of the set, in `[0, count)`, of each of this rank's rows.
        count: Number of sets over all ranks that share them.
        group: The ranks that share a set; None where every set lies on one rank.
    """

    rows: Int[Tensor, " batch"]
    count: int
    group: dist.ProcessGroup | None


def segments(
    function: str,
    mask: Bool[Tensor, "batch token"],
    *,
    scope: Scope,
    prompt_ids: Int[Tensor, " batch"] | None,
    group: dist.ProcessGroup | None,
) -> Segments:
    """The sets of responses of a scope, numbered alike on all ranks; memory of a few rows.

    Args:
        function: Name of the public function, for errors.
        mask: True for valid response tokens.
        scope: `"response"` never communicates.
        prompt_ids: A number for each response, equal for responses to one prompt.
        group: The ranks that share the batch.

    Returns:
        The sets.

    Raises:
        TokenWeightsError: If the scope is `"prompt"` and `prompt_ids` is None.
    """
    if scope == "response":
        rows = torch.arange(len(mask), device=mask.device)
        return Segments(rows, len(mask), None)
    if scope == "batch":
        rows = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
        return Segments(rows, 1, group)
    if prompt_ids is None:
        hint = "Pass a number for each response, equal for responses to one prompt."
        raise invalid(function, "prompt_ids", "given for the scope 'prompt'", None, hint)
    own = prompt_ids.long().contiguous()  # searchsorted warns otherwise
    known = own[mask.any(-1)].unique()
    if group is not None:
        places = slice_positions(len(known), device=known.device, group=group)
        known = gathered(known, places, dim=0, group=group).unique()
    # A row without a valid token may have a number that no other row has.
    rows = torch.searchsorted(known, own).clamp(max=max(len(known) - 1, 0))
    # A batch without a token has one set, which is empty.
    return Segments(rows, max(len(known), 1), group)


def candidates(
    function: str,
    mask: Bool[Tensor, "batch token"],
    *,
    advantages: Float[Tensor, "batch #token"] | None,
    sign: Sign,
) -> Bool[Tensor, "batch token"]:
    """The valid tokens whose advantage has the sign.

    Args:
        function: Name of the public function, for errors.
        mask: True for valid response tokens.
        advantages: One for each token, or one for each response.
        sign: `"any"` takes every valid token, also those of advantage 0.

    Returns:
        A subset of `mask`.

    Raises:
        TokenWeightsError: If a sign is asked for and the advantages are missing or not finite.
    """
    if sign == "any":
        return mask
    if advantages is None:
        hint = "Pass one for each token or each response."
        raise invalid(function, "advantages", f"given for the sign {sign!r}", None, hint)
    advantages = advantages.detach().expand(mask.shape)
    require_finite(function, "advantages", advantages, mask)
    return mask & (advantages > 0 if sign == "positive" else advantages < 0)
