r"""The paper's reward, for `--reward.remote_url`: 1 if the last `\boxed{...}` matches the label.

It is -1 if it does not match, and -2 if there is no box.
"""

from typing import Any

import tokenweights as tw


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """Rewards of responses; OpenRLHF calls it with one response at a time."""
    responses = [
        query[query.find(prompt) + len(prompt) :] if prompt in query else query
        for query, prompt in zip(queries, prompts, strict=True)
    ]
    pairs = zip(responses, labels, strict=True)
    rewards = [tw.boxed_match_reward(response, label) for response, label in pairs]
    # Scores, 1 or 0, are what dynamic filtering looks at.
    return {"rewards": rewards[0], "scores": float(rewards[0] == 1.0)}
