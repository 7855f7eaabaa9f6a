"""Sampled completions of a policy, and its accuracy on the task's splits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from tokenweights._errors import invalid
from tokenweights.rewards import NO_BOX, RIGHT, boxed_match_reward, mean_at_k
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenweights_lab.task import MAX_TERMS, Problem, merged_lines

# A careful solution of the longest problem: five characters a term, ten of the box, and `<eos>`.
MAX_COMPLETION_TOKENS = 5 * MAX_TERMS + 11


@dataclass(frozen=True)
class Accuracy:
    """How well a policy solves a list of problems.

    Attributes:
        mean_at_k: Share of right completions, over all problems and samples.
        pass_at_k: Share of problems with at least one right completion.
        boxed_share: Share of completions that end in a box, right or wrong.
        merged_share: Share of completions with at least one merged line.
        samples: Completions per problem, the k of the names.
        problems: Number of problems.
    """

    mean_at_k: float
    pass_at_k: float
    boxed_share: float
    merged_share: float
    samples: int
    problems: int


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = MAX_COMPLETION_TOKENS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[list[str]]:
    """Sampled completions of each prompt.

    The same arguments give the same completions. The global random state of torch is left as it
    was, and so is the model's training mode.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, left-padding.
        prompts: The prompts.
        samples: Completions per prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Sampling temperature; 0 takes the likeliest token each time.
        top_p: Probability mass of the likeliest tokens to sample from.
        seed: Seed of the draws.
        batch_size: Completions sampled at a time; it decides which draws meet which prompt.

    Returns:
        For each prompt, its completions as text, without special tokens.

    Raises:
        TokenWeightsError: If the tokenizer pads on the right.

    Example:
        >>> from tokenweights_lab import load_policy, load_tokenizer
        >>> drawn = completions(load_policy(), load_tokenizer(), ["a-0b-8c-6?6>"], samples=2)
        >>> [len(row) for row in drawn]
        [2]
    """
    if tokenizer.padding_side != "left":
        side = tokenizer.padding_side
        raise invalid("completions", "tokenizer", "to pad on the left", side, "Set padding_side.")
    rows = [prompt for prompt in prompts for _ in range(samples)]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    texts: list[str] = []
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(rows), batch_size):
                batch = tokenizer(
                    rows[start : start + batch_size], padding=True, return_tensors="pt"
                ).to(model.device)
                tokens = generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    **(sampling if temperature > 0 else {"do_sample": False}),
                )
                replies = tokens[:, batch["input_ids"].shape[1] :]
                texts += tokenizer.batch_decode(replies, skip_special_tokens=True)
    finally:
        model.train(training)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    samples: int = 8,
    max_new_tokens: int = MAX_COMPLETION_TOKENS,
    temperature: float = 1.0,
    top_p: float = 0.7,
    seed: int = 0,
    batch_size: int = 256,
) -> Accuracy:
    """How well a policy solves problems when it samples.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, left-padding.
        problems: The problems, for example `problems("easy", 48)`.
        samples: Completions per problem.
        max_new_tokens: Longest completion, in tokens.
        temperature: Sampling temperature.
        top_p: Probability mass of the likeliest tokens to sample from.
        seed: Seed of the draws.
        batch_size: Completions sampled at a time.

    Returns:
        mean@k, pass@k, and the shares of boxed and of merging completions.

    Example:
        >>> from tokenweights_lab import load_policy, load_tokenizer, problems
        >>> accuracy(load_policy(), load_tokenizer(), problems("easy", 2), samples=1).problems
        2
    """
    drawn = completions(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )
    rewards = torch.tensor(
        [
            [boxed_match_reward(text, problem.answer) for text in row]
            for problem, row in zip(problems, drawn, strict=True)
        ]
    )
    correct = rewards == RIGHT
    merged = torch.tensor([[merged_lines(text) > 0 for text in row] for row in drawn])
    return Accuracy(
        mean_at_k=mean_at_k(correct),
        pass_at_k=correct.any(dim=1).double().mean().item(),
        boxed_share=(rewards > NO_BOX).double().mean().item(),
        merged_share=merged.double().mean().item(),
        samples=samples,
        problems=len(problems),
    )
