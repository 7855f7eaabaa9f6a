"""A rollout batch as VeRL's trainer holds it, with rows that can be told apart."""

import tokenweights as tw
import torch
from tensordict import TensorDict
from tokenweights_lab import load_tokenizer, problems
from tokenweights_lab.task import mixed_solution

ROWS = 8
LAYERS = (1, 2)
# The preplan-and-anchor recipe with its heads named, and spans that fit short responses.
CLASSES = {1: tw.HeadClasses((0,), (1,)), 2: tw.HeadClasses((1,), (0,))}
PREPLAN = {"name": "preplan_anchor40", "first": 1, "last": 6, "bound": 5}
CASES = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp2": {"strategy": "fsdp2"},
    "padded": {"strategy": "fsdp2", "remove_padding": False, "dynamic": False},
    "bucketed": {"strategy": "fsdp2", "bucket": 64},
    "lora": {"strategy": "fsdp", "lora": 4},
    "fused": {"strategy": "fsdp2", "fused": True, "offload": True},
    "fused_padded": {"strategy": "fsdp", "fused": True, "remove_padding": False, "dynamic": False},
    "bfloat16": {"strategy": "fsdp2", "precision": "bf16"},
    "flash": {"strategy": "fsdp2", "attention": "flash_cpu"},
    "ulysses": {"strategy": "fsdp2", "attention": "flash_cpu", "sequence_ranks": 2},
}


def rows():
    """Prompt and response token ids of each row, of very different lengths."""
    tokenizer = load_tokenizer()
    pairs = []
    for index, problem in enumerate(problems("train", ROWS, seed=3)):
        response = tokenizer(mixed_solution(problem, 0, index)).input_ids
        pairs.append((tokenizer(problem.prompt).input_ids, response[: 4 + 8 * index]))
    return pairs


def plain_advantages():
    """One advantage for each response, of both signs."""
    values = [(1.0 if row % 2 else -1.0) * (1 + row / 10) for row in range(ROWS)]
    return [torch.full((len(r),), v) for (_, r), v in zip(rows(), values, strict=True)]


def nested(parts):
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch(**extra):
    """The batch; `extra` holds lists of one response-aligned tensor for each row."""
    pairs = [(torch.tensor(prompt), torch.tensor(response)) for prompt, response in rows()]
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    masks = [torch.ones(len(response), dtype=torch.long) for _, response in pairs]
    fields = {
        "prompts": nested([prompt for prompt, _ in pairs]),
        "responses": nested([response for _, response in pairs]),
        "input_ids": nested([torch.cat(pair) for pair in pairs]),
        "position_ids": nested([torch.arange(length) for length in lengths]),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "row": torch.arange(len(pairs)),
        **{name: nested(parts) for name, parts in extra.items()},
    }
    return TensorDict(fields, batch_size=len(pairs))
