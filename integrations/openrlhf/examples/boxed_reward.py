r"""The paper's reward, for `--reward.remote_url`: 1 if the last `\boxed{...}` matches the label.

It is -1 if it does not match, and -2 if there is no box.
"""

from typing import Any

import tokenweights as tw


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Rewards of responses; OpenRLHF calls it with one response at a time."""
    pairs = zip(map(response, queries, prompts), labels, strict=True)
    rewards = [tw.boxed_match_reward(text, label) for text, label in pairs]
    # Scores, 1 or 0, are what dynamic filtering looks at.
    return {"rewards": rewards[0], "scores": float(rewards[0] == 1.0)}


def response(query: str, prompt: str) -> str:
    """What follows the prompt in a query; OpenRLHF may have cut off where a long prompt begins."""
    if prompt in query:
        return query[query.find(prompt) + len(prompt) :]
    query = query.lstrip("\N{REPLACEMENT CHARACTER}")  # half a character, where it was cut
    return query[overlap(prompt, query) :]


def overlap(prompt: str, query: str) -> int:
    """Length of the longest end of the prompt that the query begins with, in linear work.

    It is the last value of the prefix function (Knuth, Morris, Pratt 1977) of query and prompt.
    """
    letters = [*query[: len(prompt)], None, *prompt]
    borders = [0]
    for letter in letters[1:]:
        size = borders[-1]
        while size and letters[size] != letter:
            size = borders[size - 1]
        borders.append(size + (letters[size] == letter))
    return borders[-1]
