"""Reward functions of the command line: by name, or by import path."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tokenweights._errors import invalid, nearest
from tokenweights.rewards import (
    NO_BOX,
    RIGHT,
    WRONG,
    boxed_answer,
    boxed_match_reward,
    overlong_penalty,
    reference_answer,
)
from trl import rewards as trl_rewards

from tokenweights_trl.arguments import TrainArguments

RewardFunction = Callable[..., Any]  # some are coroutines

# Arguments with which TRL calls a reward function; it hands on no column of these names.
RESERVED_COLUMNS = (
    *("prompt", "prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")

_NUMBER = re.compile(r"[-+\u2212]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def reward_functions(
    arguments: TrainArguments,
    dataset: Dataset | IterableDataset,
    *,
    max_completion_length: int | None,
) -> list[RewardFunction]:
    """The reward functions that the command line names.

    Args:
        arguments: Parsed command line.
        dataset: The dataset to train on. Every answer that is compared is checked here, those of
            a stream when they come.
        max_completion_length: Longest response, in tokens.

    Returns:
        Functions of TRL's keyword arguments that give one reward for each response.

    Raises:
        TokenWeightsError: If a name is unknown or an import path leads nowhere, the dataset has no
            usable column with the reference answer, or the overlong buffer does not fit.
    """
    names = arguments.reward_funcs or ["boxed_match"]
    buffer, longest = arguments.overlong_buffer, max_completion_length
    if buffer and not 0 < buffer <= (longest or 0):
        condition = f"in [0, max_completion_length = {longest}]"
        hint = "It is the last part of the longest response; 0 is no penalty."
        raise invalid("train", "overlong_buffer", condition, buffer, hint)
    if buffer and names[0] not in MATCHES:
        condition = f"0 unless the first of `reward_funcs` is one of {', '.join(MATCHES)}"
        raise invalid("train", "overlong_buffer", condition, buffer, "Leave one of the two out.")
    found = []
    for place, name in enumerate(names):
        if name in MATCHES:
            penalized = (buffer, longest) if buffer and longest and place == 0 else None
            found.append(_match_reward(name, arguments, dataset, penalized))
        elif name in OF_TRL:
            found.append(getattr(trl_rewards, name))
        else:
            found.append(_imported(name))
    return found


def number_of(text: str) -> Decimal | None:
    """The number that a text ends on: after the last `####`, in the last box, or the last at all.

    Args:
        text: A response, or an answer as GSM8K has it.

    Returns:
        The number, without thousands separators and a dollar sign, or None.

    Example:
        >>> [str(number_of(text)) for text in ("6 * 7 = 42 #### 1,042", "so it is $3.50.", "none")]
        ['1042', '3.50', 'None']
    """
    _, mark, after = text.rpartition("####")
    where = after if mark else boxed_answer(text) or text
    numbers = _NUMBER.findall(where)
    if not numbers:
        return None
    digits = (numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", "")
    return Decimal(digits.replace("\u2212", "-"))


def numeric_match_reward(response: str, answer: object) -> float:
    """Reward of a response by its number, as `number_of` reads it on both sides.

    Args:
        response: A response's text.
        answer: The reference answer.

    Returns:
        -2 without a number, -1 for another number, 1 for the answer's.

    Example:
        >>> [numeric_match_reward(text, "3 * 6 = 18 #### 18") for text in ("18.0", "1", "?")]
        [1.0, -1.0, -2.0]
    """
    found = number_of(response)
    if found is None:
        return NO_BOX
    return RIGHT if found == number_of(reference_answer(answer)) else WRONG


def compared(name: str, response: str, answer: object) -> str:
    """What a matching reward read in a response, and in its answer, in words."""
    read = {"boxed_match": boxed_answer, "numeric_match": number_of}[name]
    right = reference_answer(answer)
    shown = right if name == "boxed_match" else str(number_of(right))
    got = read(response)
    what = {"boxed_match": "\\boxed{}", "numeric_match": "number"}[name]
    return f"{f'no {what}' if got is None else repr(str(got))} with the answer {shown!r}"


MATCHES = {"boxed_match": boxed_match_reward, "numeric_match": numeric_match_reward}


def _match_reward(
    name: str,
    arguments: TrainArguments,
    dataset: Dataset | IterableDataset,
    penalized: tuple[int, int] | None,
) -> RewardFunction:
    column = answer_column(arguments, list(next(iter(dataset))))
    check = partial(_checked, name, column=column)
    if isinstance(dataset, Dataset):
        for row, answer in enumerate(dataset[column]):
            check(answer, f"row {row}")

    def match(
        completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        rewards = [
            MATCHES[name](text_of(completion), check(answer, "a row"))
            for completion, answer in zip(completions, columns[column], strict=True)
        ]
        if penalized is not None:
            lengths = torch.tensor([len(ids) for ids in completion_ids])
            longest, buffer = penalized[1], penalized[0]
            penalties = overlong_penalty(lengths, max_length=longest, buffer_length=buffer)
            rewards = (penalties + torch.tensor(rewards, dtype=penalties.dtype)).tolist()
        return rewards

    match.__name__ = name
    return match


def _checked(name: str, answer: Any, place: str, *, column: str) -> str:
    """The answer as text, if the reward can find it in a response at all."""
    where = f"{place}, column {column!r}"
    text = reference_answer(answer, place=where)
    if name == "boxed_match" and "####" in text:
        hint = "It is GSM8K's form, which `--reward_funcs numeric_match` reads."
        raise invalid("train", "answer", "as short as a box holds it", f"#### ({where})", hint)
    if name == "numeric_match" and number_of(text) is None:
        hint = "Name the column of the numbers: `--answer_column NAME`."
        raise invalid("train", "answer", "with a number", f"{text[:40]!r} ({where})", hint)
    return text


def answer_column(arguments: TrainArguments, columns: list[str]) -> str:
    """The column of the reference answer."""
    named = [arguments.answer_column] if arguments.answer_column else ["answer", "solution"]
    if named[0] in RESERVED_COLUMNS:
        hint = "TRL uses this name itself and does not pass the column on. Rename the column."
        raise invalid("train", "answer_column", "with a name of its own", named[0], hint)
    for name in named:
        if name in columns:
            return name
    hint = "Name the column of the reference answer: `--answer_column NAME`."
    raise invalid("train", "answer_column", f"to be a column ({' or '.join(named)})", columns, hint)


def text_of(completion: Any) -> str:
    """The text of a completion, also of one that is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _imported(path: str) -> RewardFunction:
    """A function of the user's, `package.module:function`, or with a dot as TRL writes it."""
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    if not module_name or not name:
        known = (*MATCHES, *OF_TRL)
        near = nearest(path, list(known))
        hint = f"Did you mean {near!r}?" if near else "Write `package.module:function`."
        condition = f"one of {', '.join(known)}, or an import path"
        raise invalid("train", "reward_funcs", condition, path, hint)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        hint = "Is its folder the working directory, or on PYTHONPATH?"
        got = f"{path} ({type(error).__name__}: {error})"
        raise invalid("train", "reward_funcs", "a module that imports", got, hint) from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        near = nearest(name, [each for each in vars(module) if callable(getattr(module, each))])
        hint = f"Did you mean {near!r}?" if near else "Define the function there."
        raise invalid("train", "reward_funcs", f"a function in {module_name}", path, hint)
    return found
