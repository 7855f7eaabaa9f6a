"""Training runs on the ranks of torchrun, or alone; rank 0 writes down what came out of them.

The global batch does not depend on the number of ranks: prompts come in the same order, and
generation is greedy on logits with a fixed noise per global row, which is sampling that repeats.
"""

import json
import os
import sys

import tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from ranks import finish, repeatable

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

ROWS = 8


class Repeatable(TokenWeightsGRPOTrainer):
    own_extrema = torch.empty(0)
    rollouts = ()

    def create_accelerator_and_postprocess(self):
        if "ACCELERATE_USE_FSDP" in os.environ:
            # Accelerate shards where it sees GPUs only; sharding itself runs on CPUs as well.
            PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generator = torch.Generator().manual_seed(self.state.global_step)
        shape = (ROWS, self.max_completion_length, len(tiny.tokenizer()))
        noise = -(-torch.rand(shape, generator=generator).log()).log()
        start = self.accelerator.process_index * len(prompt_ids)
        noise = noise[start : start + len(prompt_ids)]
        with tiny.biased_logits(self.accelerator.unwrap_model(self.model), noise):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        self.batch = batch
        scores = self.recipe.scores(batch)
        if scores is not None:
            own = scores[batch.mask]
            self.own_extrema = torch.stack([own.min(), own.max()])
        return batch

    def _weighted(self, output, columns):
        weighted = super()._weighted(output, columns)
        mask, real = output["completion_mask"].bool(), output["prompt_mask"].bool()
        weights = self.recipe.weighted(self.batch, step=self.state.global_step).weights
        own = [
            {
                "prompt": output["prompt_ids"][row][real[row]].tolist(),
                "tokens": output["completion_ids"][row][mask[row]].tolist(),
                "weights": weights[row][mask[row]].tolist(),
                "products": weighted["advantages"][row][mask[row]].tolist(),
                "prompt_id": prompt_id,
                "rank": self.accelerator.process_index,
            }
            for row, prompt_id in enumerate(self.batch.prompt_ids.tolist())
        ]
        self.rollouts += (gather_object(own),)
        return weighted


def outcome(folder: str, changes: dict) -> dict:
    trainer = tiny.trainer(
        Repeatable,
        TokenWeightsGRPOConfig,
        folder,
        optim="sgd",
        learning_rate=0.05,
        **repeatable(batch_size=4),
        **changes,
    )
    trainer.train()
    gather = trainer.accelerator.gather
    parameters = [getattr(p, "full_tensor", lambda p=p: p)() for p in trainer.model.parameters()]
    parameters = torch.cat([whole.detach().flatten() for whole in parameters])
    return {
        "source": trainer.score_source,
        "sharded": sum(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rollouts": trainer.rollouts,
        "extrema": gather(trainer.own_extrema[None]).tolist(),
        "spread": float((gather(parameters[None]) - parameters).abs().max()),
        "parameters": parameters.tolist(),
    }


if __name__ == "__main__":
    path, cases = sys.argv[1:]
    outcomes = {
        case: outcome(f"{path}.out", changes) for case, changes in json.loads(cases).items()
    }
    finish(path, outcomes)
