"""The paper's reward, as VeRL calls it."""

from typing import Any

from tokenweights.rewards import RIGHT, boxed_match_reward


def boxed_match(solution_str: str, ground_truth: object, **kwargs: Any) -> dict[str, float]:
    r"""-2 for no box, -1 for a wrong and 1 for the right one, and the accuracy next to it.

    Args:
        solution_str: The response.
        ground_truth: The reference answer, text or a number.
        kwargs: What else VeRL hands over; not read.

    Returns:
        `score` to train on; `acc`, 0 or 1, of which VeRL's validation takes mean@k.

    Raises:
        TokenWeightsError: If `tokenweights.reference_answer` refuses the ground truth.

    Example:
        >>> boxed_match(solution_str=r"It is \boxed{7}.", ground_truth="7", data_source="math")
        {'score': 1.0, 'acc': 1.0}
    """
    score = float(boxed_match_reward(solution_str, ground_truth))
    return {"score": score, "acc": float(score == RIGHT)}
