"""A training step with a real tool on the ranks of torchrun, or alone; rank 0 writes the rollout.

TRL renders the tool in Qwen3's chat template, parses calls, runs them and generates on. A tiny
policy would never call one: a bias on its logits scripts the calls, and adds to the rest a noise
that follows from the row's text, which is sampling that is the same on any number of ranks.

Usage: python tools_run.py PATH '{"recipes": [...], "environment": false}'
"""

import json
import string
import sys
from collections import Counter
from importlib.resources import files

import tiny
import tokenweights as tw
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from ranks import finish, repeatable
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": 7}}\n</tool_call><|im_end|>'
QUESTIONS = ("1+7", "20+7")
# Of four responses to a question, these call the tool.
CALLING = (True, True, False, True)
# Room for a call and its answer, and the most that is written without a call or after it.
LENGTH, MOST = 200, 9
CERTAIN = 1e4


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


class Calculator:
    """An environment whose one method is the tool."""

    add = staticmethod(add)

    def reset(self, **_):
        return None


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and the marks of a chat."""
    words = ["<pad>", "<|im_end|>", "<unk>", "<|im_start|>", *dict.fromkeys(string.printable)]
    vocabulary = {word: index for index, word in enumerate(words)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    characters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    return made


def policy(**changes):
    """Weights so wide that attention is far from uniform over a prompt of 700 characters, too."""
    size = {"vocab_size": len(tokenizer()), "max_position_embeddings": 1024}
    return tiny.policy(2, initializer_range=0.35, **size, **changes)


def reward(completion_ids, **_):
    return [float(sum(ids) % 11) for ids in completion_ids]


class Scripted(TokenWeightsGRPOTrainer):
    recipes = ()
    rollout = None

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        seen: Counter = Counter()
        bias = torch.zeros(len(prompt_ids), LENGTH, len(self._tokenizer))
        for row, ids in enumerate(prompt_ids):
            place = seen[tuple(ids)]
            seen[tuple(ids)] += 1
            generator = torch.Generator().manual_seed(hash((place, *ids)) % 2**31)
            bias[row] = -(-torch.rand(bias.shape[1:], generator=generator).log()).log()
            answered = "<tool_response>" in self._tokenizer.decode(ids)
            if CALLING[place % len(CALLING)] and not answered:
                for step, token in enumerate(self._tokenizer(CALL % place).input_ids):
                    bias[row, step, token] += CERTAIN
            else:
                bias[row, MOST - place, self._tokenizer.eos_token_id] += CERTAIN
        with tiny.biased_logits(self.accelerator.unwrap_model(self.model), bias):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        made = [tw.recipe(fields).on_model(self.model) for fields in self.recipes]
        self.weights = [recipe.weighted(batch, step=0).weights for recipe in made]
        return batch

    def _weighted(self, output, columns):
        plain, weighted = output["advantages"], super()._weighted(output, columns)
        real, whole = output["prompt_mask"].bool(), output["completion_mask"].bool()
        own = [
            {
                "prompt": output["prompt_ids"][row][real[row]].tolist(),
                "tokens": output["completion_ids"][row][whole[row]].tolist(),
                "own": output["tool_mask"][row][whole[row]].tolist(),
                "advantage": plain[row].item(),
                "products": weighted["advantages"][row][whole[row]].tolist(),
                "weights": [weights[row][whole[row]].tolist() for weights in self.weights],
            }
            for row in range(len(whole))
        ]
        self.rollout = gather_object(own)
        return weighted


def rollout(folder: str, recipes: list, environment: bool) -> list:
    """The rows of the one rollout batch; the first recipe trains, and all weigh."""
    arguments = tiny.arguments(
        TokenWeightsGRPOConfig,
        folder,
        recipe=recipes[0],
        max_steps=1,
        max_completion_length=LENGTH,
        **repeatable(batch_size=4),
    )
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    trainer = Scripted(
        policy(),
        lambda completion_ids, **_: [float(sum(ids) % 11) for ids in completion_ids],
        arguments,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        tools=None if environment else [add],
        environment_factory=Calculator if environment else None,
    )
    trainer.recipes = recipes
    trainer.train()
    return trainer.rollout


if __name__ == "__main__":
    path, asked = sys.argv[1:]
    finish(path, rollout(f"{path}.out", **json.loads(asked)))
