"""Geometry of the gradients of a partition at training scale: accumulated, sharded, bounded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, agreement
from tokenweights.gradients.evaluation import (
    LossEvaluation,
    TokenLoss,
    finite_square,
    taken_gradients,
)
from tokenweights.gradients.geometry import GradientGeometry, geometry_of
from tokenweights.gradients.preserved import preserved
from tokenweights.gradients.selection import selected_parameters
from tokenweights.gradients.shards import inner_product
from tokenweights.gradients.sketch import gradient_sketch, sketched_inner_product
from tokenweights.losses import Denominator, loss_denominator


@dataclass(frozen=True)
class ProbeGeometry:
    """Geometry of the groups of a partition.

    Attributes:
        groups: One geometry for each group, in the order of the group numbers.
        full_norm: Length of the full gradient.
        cosine_error: Bound on the standard deviation of a cosine over sketch seeds; 0 if exact. For
            a projection ratio multiply by the group's norm ratio. Norm ratios are always exact.
    """

    groups: tuple[GradientGeometry, ...]
    full_norm: float
    cosine_error: float


@dataclass(frozen=True)
class GradientProbe:
    r"""Measures how the gradients of token groups lie towards the full gradient (Eq. 4-6).

    One group at a time: the full gradient is accumulated over all micro-batches and kept, then each
    group's is accumulated in the parameters' own `.grad`, measured and dropped. So memory beside
    the model is the backward pass with its gradient, and one copy of the parameters for the full
    gradient; time is one forward and backward pass for each group and one for the whole.

    With `sketch_width` $k$ the full gradient is not kept either, but only $k$ numbers of a fixed
    random projection. Norms stay exact; a cosine is then unbiased with a standard deviation of at
    most $\sqrt{2 / k}$ over seeds, and may leave $[-1, 1]$ by as much.

    Works on plain modules, DDP and FSDP2, whose DTensor shards stay where they are. For engines
    with flat shards give `backward` and `gradients`. Only scalars cross ranks beside what the
    wrapper itself reduces. Parameters, buffers, gradients and random state stay as they are.

    Attributes:
        model: The module whose parameters are probed, with its wrapper if it has one.
        pattern: Regular expression; only parameters whose name it is found in.
        layers: Only parameters of these layers.
        sketch_width: Width of the sketch; None measures exactly.
        seed: Chooses the projection of the sketch.
        group: The ranks that share the batch, each with its own rows.
        backward: Runs a backward pass, such as an engine's `backward`; None for torch's own.
        gradients: Returns this rank's flat shards of the gradient that `backward` has accumulated
            since the last call, and clears them; None reads `.grad`.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> probe = GradientProbe(model)
        >>> found = probe.geometry(
        ...     lambda: model(inputs)[..., 0], torch.tensor([[0, 1]]), mask=mask, count=2
        ... )
        >>> [round(geometry.projection_ratio, 6) for geometry in found.groups]
        [0.5, 0.5]
    """

    model: nn.Module
    pattern: str | None = None
    layers: Sequence[int] | None = None
    sketch_width: int | None = None
    seed: int = 0
    group: dist.ProcessGroup | None = None
    backward: Callable[[Tensor], None] | None = None
    gradients: Callable[[], Sequence[Tensor]] | None = None

    def __post_init__(self) -> None:
        if self.sketch_width is not None and self.sketch_width < 1:
            raise invalid("GradientProbe", "sketch_width", ">= 1", self.sketch_width, "Try 2**16.")
        if self.gradients is not None and (self.pattern is not None or self.layers is not None):
            raise invalid(
                "GradientProbe",
                "gradients",
                "None with a parameter filter",
                "both",
                "Flat shards have no names; let the callable leave out what it should.",
            )

    @agreed
    @typed
    def geometry(
        self,
        token_loss: TokenLoss | Sequence[TokenLoss],
        groups: Int[Tensor, "batch token"] | Bool[Tensor, "group batch token"],
        *,
        mask: Bool[Tensor, "batch token"],
        count: int | None = None,
        denominator: Denominator = "all_tokens",
        tolerance: float = 1e-5,
    ) -> ProbeGeometry:
        """Geometry of each group's gradient against that of the mean over all valid tokens.

        Args:
            token_loss: Callable that computes unreduced losses, `batch token`, from the current
                parameters; or one for each micro-batch of consecutive rows. Each is called once for
                every group and once more.
            groups: Group number of each token, from 0, and -1 for tokens in no group; or one mask
                for each group, which may overlap, as anchors and a random subset do.
            mask: True for valid response tokens.
            count: Number of groups where `groups` holds numbers, the same on every rank.
            denominator: What each group's loss divides by; see `group_gradients`.
            tolerance: Where every valid token is in exactly one group, the largest distance from
                one of the sum of the projection ratios, taken to the all-token mean.

        Returns:
            The geometry of every group; an empty group has norm ratio 0.

        Raises:
            TokenWeightsError: If the projection ratios of a partition do not sum to one, the
                gradient or the losses are not finite, the losses are not `batch token` or without
                a graph, or `tolerance` is not positive.
        """
        if not tolerance > 0:
            raise invalid("GradientProbe", "tolerance", "> 0", tolerance, "Try 1e-5.")
        subsets = _subsets(groups, mask, count)
        engine = self.gradients is not None  # its hooks are how it collects gradients
        with preserved("GradientProbe", self.model, hooks_allowed=engine) as rewind:
            losses = LossEvaluation(
                "GradientProbe", token_loss, mask, rewind=rewind, group=self.group
            )
            full = self._measured(losses, None, losses.count)
            full_square = finite_square("GradientProbe", full.square)
            inner, squares, shares = [], [], []
            for members in subsets:
                total = losses.count
                if denominator != "all_tokens":
                    # The weights are 0 or 1, so their sum is the number of selected tokens.
                    total = float(loss_denominator(members, group=self.group))
                subset = self._measured(losses, members, total)
                inner.append(full.inner_product(subset))
                squares.append(subset.square)
                shares.append(total / losses.count if losses.count else 0.0)
                del subset  # before the next group's gradient exists
        once = loss_denominator(mask & (subsets.sum(0) == 1), group=self.group)
        if float(once) == losses.count and full_square > 0:
            own = full.inner_product(full)
            total = sum(i * share for i, share in zip(inner, shares, strict=True)) / own
            if not abs(total - 1) <= tolerance:
                raise invalid(
                    "GradientProbe",
                    "token_loss",
                    f"with projection ratios that sum to one within {tolerance}",
                    total,
                    "Is it a function of the parameters and of torch's random state alone?",
                )
        return ProbeGeometry(
            groups=tuple(
                geometry_of(
                    inner=i,
                    subset_square=square,
                    full_square=full_square,
                    sketched=self.sketch_width is not None,
                )
                for i, square in zip(inner, squares, strict=True)
            ),
            full_norm=full_square**0.5,
            cosine_error=0.0 if self.sketch_width is None else (2 / self.sketch_width) ** 0.5,
        )

    def _measured(
        self, losses: LossEvaluation, members: Tensor | None, denominator: float
    ) -> "_Measured":
        losses.backward(
            None if members is None else members.double(),
            denominator=denominator,
            run=Tensor.backward if self.backward is None else self.backward,
        )
        if self.gradients is None:
            chosen = selected_parameters(self.model, pattern=self.pattern, layers=self.layers)
            gradient, shards = taken_gradients(list(chosen.values()), self.model), None
        else:
            with agreement("GradientProbe", self.group):
                gradient, shards = self.gradients(), self.group
            if members is None and self.sketch_width is None:  # the engine may use its memory again
                gradient = [shard.clone() for shard in gradient]
        return _Measured(gradient, shards, self.sketch_width, self.seed)


def _subsets(groups: Tensor, mask: Tensor, count: int | None) -> Tensor:
    """One mask for each group, `group batch token`."""
    if groups.dtype == torch.bool:
        return groups & mask
    if count is None or count < 0 or bool((mask & ((groups >= count) | (groups < -1))).any()):
        hint = "Pass the number of groups; -1 stands for no group."
        raise invalid("GradientProbe", "count", "above every group number", count, hint)
    numbers = torch.arange(count, device=groups.device)
    return mask & (groups == rearrange(numbers, "group -> group 1 1"))


class _Measured:
    """A gradient, or its sketch, with its squared norm."""

    def __init__(
        self,
        gradient: Sequence[Tensor],
        group: dist.ProcessGroup | None,
        sketch_width: int | None,
        seed: int,
    ):
        self.square = inner_product(gradient, gradient, group=group)
        self._group = group
        self._gradient, self._sketch = gradient, None
        if sketch_width is not None:
            self._sketch = gradient_sketch(gradient, width=sketch_width, seed=seed, group=group)
            self._gradient = ()

    def inner_product(self, other: "_Measured") -> float:
        if self._sketch is not None and other._sketch is not None:
            return sketched_inner_product(self._sketch, other._sketch)
        return inner_product(self._gradient, other._gradient, group=self._group)
