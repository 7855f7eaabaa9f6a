"""Numbers for responses and prompts, where a trainer has names or texts for them."""

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor


def label_numbers(labels: Iterable[str]) -> Int[Tensor, " batch"]:
    """A number for each label, the same for equal ones, in order of first appearance."""
    found = list(labels)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(found))}
    return torch.tensor([numbers[label] for label in found], dtype=torch.long)


def text_numbers(
    step: int, prompts: Iterable[Tensor], responses: Iterable[Tensor]
) -> Int[Tensor, " batch"]:
    """A number in [0, 2^48) for each response that stays with it however the batch is ordered.

    It follows from step and text, so random rules give the same masks on any number of ranks.

    Args:
        step: Training step.
        prompts: Token ids of each response's prompt.
        responses: Token ids of each response; equal ones are counted.

    Returns:
        Numbers.
    """
    seen: dict[str, int] = {}
    numbers = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = f"{step} {prompt.tolist()} {response.tolist()}"
        seen[text] = seen.get(text, 0) + 1
        digest = hashlib.sha256(f"{text} {seen[text]}".encode()).digest()
        numbers.append(int.from_bytes(digest[:6], "big"))
    return torch.tensor(numbers, dtype=torch.long)
