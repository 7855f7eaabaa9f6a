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
    seen: dict[bytes, int] = {}
    numbers = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = _digest(f"{step} {len(prompt)} ".encode(), _bytes(prompt), _bytes(response))
        seen[text] = seen.get(text, 0) + 1
        numbers.append(int.from_bytes(_digest(text, seen[text].to_bytes(8, "little")), "little"))
    return torch.tensor(numbers, dtype=torch.long)


def _bytes(token_ids: Tensor) -> memoryview:
    return token_ids.to("cpu", torch.int32).contiguous().numpy().data


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.digest()
