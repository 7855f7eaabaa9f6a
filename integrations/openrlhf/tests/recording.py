"""A rule of one's own that writes down the rollout batches it sees, and weighs as Low2High does."""

from dataclasses import dataclass
from pathlib import Path

import tokenweights as tw
import torch

FILE = "rollout{}.pt"
COLUMNS = ("log_probs", "predictive_entropy", "sampler_log_probs", "rewards", "advantages")


@dataclass(frozen=True)
class Recorded:
    folder: str = "."
    columns = COLUMNS

    def __call__(self, scores, batch, *, step, group=None):
        weights = tw.recipe("low2high").rule(scores, batch, step=step, group=group)
        names = ("mask", "token_ids", "prompt_ids", "attention", *COLUMNS)
        rows = {name: getattr(batch, name) for name in names} | {"weights": weights}
        torch.save(rows, Path(self.folder) / FILE.format(step))
        return weights
