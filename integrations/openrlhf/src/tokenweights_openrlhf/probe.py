"""Gradient geometry during training: every N steps, on a probe batch that stays the same."""

from functools import partial
from typing import Any

import tokenweights as tw
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules
from tokenweights._errors import invalid
from tokenweights.gradients.preserved import preserved
from tokenweights.recipes import RolloutBatch
from tokenweights.recipes.attention import AttentionEntropy
from torch import Tensor

from tokenweights_openrlhf.scores import TokenWeightsPolicyActor, attention_scores


def probe_batches(rows: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """The rows that have an advantage, as many for each rank; none where no row has one.

    Args:
        rows: `sequences`, `attention_mask`, `action_mask` and `advantages` of a rollout batch.
        ranks: Number of ranks.

    Returns:
        For each rank its rows, with `sample_ids`; rows without a token fill up.
    """
    chosen = ((rows["advantages"] != 0) & rows["action_mask"].bool()).any(1).nonzero().flatten()
    if len(chosen) == 0:
        return []
    own = torch.cat([chosen, chosen[:1].expand(-len(chosen) % ranks)])
    batch = {name: values[own] for name, values in rows.items()}
    batch["sample_ids"] = torch.arange(len(own))
    batch["action_mask"][len(chosen) :] = 0
    parts = {name: values.tensor_split(ranks) for name, values in batch.items()}
    return [{name: part[rank] for name, part in parts.items()} for rank in range(ranks)]


class GradientProbePolicyActor(TokenWeightsPolicyActor):
    r"""The policy actor with a gradient probe, for `--tokenweights.gradient_probe_steps`.

    The gradient is that of $-A_t \pi(t) / \pi_{probe}(t)$ at ratio 1, before any weights. The
    engine takes no part in it: passes run on the module inside, and gradients leave the backward
    pass before the engine's hooks see them. So its buffers and counters stay as they are. A rank
    keeps its share of each gradient in float32.
    """

    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; also begins a series, with the middle layer if the recipe has none."""
        result = super().init_model_from_pretrained(strategy, *args, **kwargs)
        own = self.attention if isinstance(self.attention, AttentionEntropy) else AttentionEntropy()
        self._attention = own.placed(**self.attention_layers())
        self._series = tw.GradientSeries()
        if strategy.args.ds.zero_stage == 3 and get_z3_leaf_modules(self.actor.model.module):
            hint = "DeepSpeed reduces gradients of its leaf modules apart: leave out the probe."
            raise invalid("probe", "model", "without experts at ZeRO-3", "one with experts", hint)
        return result

    def gradient_metrics(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """The `gradient/*` metrics; all ranks call it.

        Args:
            batch: This rank's rows, from `probe_batches`.

        Returns:
            As `tokenweights.GradientSeries` lists them, the same on every rank.
        """
        device = torch.cuda.current_device()
        rows = {name: values.to(device) for name, values in batch.items()}
        args, engine, mask = self.strategy.args, self.actor.model, rows["action_mask"].bool()
        model, batched = engine.module, not args.train.dynamic_batch_enable
        size = args.train.micro_batch_size if batched else 1
        parts = [slice(start, start + size) for start in range(0, len(mask), size)]
        self.actor.model = model
        try:
            with preserved("gradient_metrics", model, hooks_allowed=True), torch.no_grad():
                passes = [self._scored(rows, part) for part in parts]
            scores, log_probs = (torch.cat(found) for found in zip(*passes, strict=True))
            own, advantages = partial(self._log_probs, rows), rows["advantages"].to(log_probs.dtype)
            losses = tw.unclipped_losses(own, log_probs, advantages, mask, micro_batch_size=size)
            with tw.CaughtGradients(model, group=dist.group.WORLD) as caught:
                probe = tw.GradientProbe(
                    model, group=caught.group, backward=caught.backward, gradients=caught.take
                )
                tokens: Any = {"scores": scores, "mask": mask, "sample_ids": rows["sample_ids"]}
                tolerance = args.tokenweights.gradient_probe_tolerance
                return self._series.metrics(probe, losses, **tokens, tolerance=tolerance)
        finally:
            self.actor.model = engine
            engine.empty_partition_cache()  # ZeRO-3 lets go of what a backward pass left gathered
            torch.cuda.empty_cache()  # the inference engines wake up next

    def _log_probs(self, rows: dict[str, Tensor], part: slice) -> Tensor:
        names = ("sequences", "action_mask", "attention_mask")
        return self.actor(*(rows[name][part] for name in names))

    def _scored(self, rows: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        """Attention entropies and log-probabilities under the present policy."""
        mask, attended = rows["action_mask"][part].bool(), rows["attention_mask"][part]
        with attention_scores(self.actor, attended, self._attention, mask.shape[1]) as scores:
            log_probs = self._log_probs(rows, part)
        return self._attention(RolloutBatch(mask=mask, attention=scores)).float(), log_probs
