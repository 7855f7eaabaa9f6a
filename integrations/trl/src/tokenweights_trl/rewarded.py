"""A trainer whose token records hold the rewards of their responses."""

from dataclasses import replace
from typing import Any

import torch
from tokenweights import RolloutBatch

from tokenweights_trl.trainer import TokenWeightsGRPOTrainer


class RewardedGRPOTrainer(TokenWeightsGRPOTrainer):
    """`TokenWeightsGRPOTrainer` with the weighted sum of its reward functions in token records."""

    def _batch(self, output: dict[str, Any], columns: dict[str, Any]) -> RolloutBatch:
        batch = super()._batch(output, columns)
        # TRL keeps the rewards of the last rollout batch, of all ranks one after another.
        parts = [list(self._logs["rewards"][name]) for name in self.reward_func_names]
        rows, ranks = len(batch.mask), self.accelerator.num_processes
        if any(len(part) < rows * ranks for part in parts):
            return batch
        start = -(ranks - self.accelerator.process_index) * rows
        mine = [part[start : start + rows or None] for part in parts]
        device = batch.mask.device
        values = torch.tensor(mine, dtype=torch.float32, device=device)
        weights = self.reward_weights.to(device)
        return replace(batch, rewards=(values * weights[:, None]).nansum(0))
