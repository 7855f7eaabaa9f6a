"""An agent for OpenRLHF: who gives an even answer gets another problem, and everybody a last word.

It runs beside the engine, and asks it to be cut in the middle of the second rollout batch.
"""

import torch
import vllm
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor
from tokenweights_lab import problems

PROMPTS, SAMPLES = 2, 4
CUT = 9  # tokens of the second batch that the first policy writes
LAST_WORD = "?"


class Environment(AgentInstanceBase):
    begun = 0

    def __init__(self):
        self.turns = 0

    async def reset(self, states, **_):
        Environment.begun += 1
        if Environment.begun == PROMPTS * SAMPLES + 1:
            vllm.AsyncLLMEngine.halt_after = CUT
        return states

    async def step(self, states, **_):
        text = states["action_text"].removesuffix("<eos>")
        self.turns += 1
        done = self.turns == 2 or text[-2:-1] not in [*"02468"]
        feedback = LAST_WORD if done else problems("easy", 8)[len(text) % 8].prompt
        return {
            "rewards": torch.tensor(float(sum(map(ord, text)) % 11)),
            "environment_feedback": feedback,
            "done": done,
            "sampling_params": states["sampling_params"],
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Environment)
