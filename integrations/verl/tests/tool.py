"""A tool for VeRL's agent loop, which loads this file on its own."""

from tokenweights_lab import problems
from verl.tools.function_tool import function_tool


@function_tool("another")
def another(index: int) -> str:
    """Gives another problem.

    Args:
        index: Which of them.
    """
    return problems("easy", 8)[index % 8].prompt


def remainder(solution_str, ground_truth, **kwargs):
    """A reward that differs within most groups."""
    return float(sum(map(ord, solution_str)) % 11)
