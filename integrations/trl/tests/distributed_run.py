"""One training run on the ranks of torchrun, or alone; rank 0 writes down what came out of it.

The global batch does not depend on the number of ranks: prompts come in the same order, and
generation is greedy on logits with a fixed noise per global row, which is sampling that repeats.
"""

import json
import os
import sys

import tiny
import torch
from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

ROWS = 8


class Repeatable(TokenWeightsGRPOTrainer):
    own_extrema = torch.empty(0)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generator = torch.Generator().manual_seed(self.state.global_step)
        uniform = torch.rand(ROWS, self.max_completion_length, len(tiny.tokenizer()), generator=generator)
        start = self.accelerator.process_index * len(prompt_ids)
        noise = -(-uniform.log()).log()[start : start + len(prompt_ids)]
        step = iter(range(self.max_completion_length))
        model = self.accelerator.unwrap_model(self.model)
        hook = model.lm_head.register_forward_hook(
            lambda module, inputs, logits: logits + noise[:, None, next(step)]
        )
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            hook.remove()

    def _weighted(self, output, scores):
        if scores is not None:
            own = scores[output["completion_mask"].bool()]
            self.own_extrema = torch.stack([own.min(), own.max()])
        return super()._weighted(output, scores)


def main(result_path: str, changes: dict) -> None:
    trainer = tiny.trainer(
        Repeatable,
        TokenWeightsGRPOConfig,
        result_path + ".out",
        optim="sgd",
        learning_rate=0.05,
        shuffle_dataset=False,
        generation_kwargs={"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **changes,
    )
    trainer.train()
    accelerator = trainer.accelerator
    extrema = accelerator.gather(trainer.own_extrema[None])
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    spread = (accelerator.gather(parameters[None]) - parameters).abs().max()
    if accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "ranks": accelerator.num_processes,
            "source": trainer.score_source,
            "history": [{k: float(v) for k, v in entry.items()} for entry in history],
            "extrema": extrema.tolist(),
            "spread": float(spread),
            "parameters": parameters.tolist(),
        }
        with open(result_path, "w") as file:
            json.dump(result, file)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
