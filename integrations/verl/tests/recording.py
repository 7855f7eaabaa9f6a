"""VeRL's trainers with what the adapter reads and writes of each rollout batch written down.

Beside it a parser for agent loops, to which every even answer calls the tool of `tool.py`. VeRL
imports this module, and no test does: a trainer registers once.
"""

import json
from pathlib import Path

import torch
import transfer_queue as tq
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.trainer.ppo import v1

from tokenweights_verl.scores import ENTROPY, FIELDS
from tokenweights_verl.trainer import TokenWeightsMixin

FILE = "rollout{}_{}.pt"  # by step, and by the update within it


@ToolParser.register("even")
class EvenAnswers(ToolParser):
    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        if text[-2:-1] not in [*"02468"]:
            return text, []
        return text, [FunctionCall(name="another", arguments=json.dumps({"index": len(text)}))]


def recording(mode, plain):
    class Plain(plain):
        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            self.plain = self.rows(batch, "advantages")["advantages"]
            return batch

        def rows(self, batch, *fields):
            where = {"keys": batch.keys, "partition_id": batch.partition_id}
            found = tq.kv_batch_get(**where, select_fields=[*fields])
            return {name: [row.clone() for row in found[name].unbind()] for name in fields}

    class Recording(TokenWeightsMixin, Plain):
        def __init__(self, config):
            config.trainer.v1.trainer_mode = f"tokenweights_{mode}"
            super().__init__(config)

        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            read = map(ENTROPY.format, self.recipe.readings)
            found = {"keys": batch.keys, "tags": batch.tags, "plain": self.plain}
            found |= self.rows(batch, *FIELDS, "rm_scores", *read)
            folder = Path(self.config.trainer.default_local_dir).parent
            update = getattr(self, "local_trigger_step", 0)
            torch.save(found, folder / FILE.format(self.global_steps, update))
            return batch

    return v1.register_trainer(f"recording_{mode}")(Recording)


recording("sync", v1.PPOTrainerSync)
recording("colocate_async", v1.PPOTrainerColocateAsync)
recording("separate_async", v1.PPOTrainerSeparateAsync)
