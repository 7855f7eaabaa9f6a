r"""The running-total task: short sums modulo ten that a careful solver always gets right.

A prompt lists terms, each with a label, a sign and a digit, and ends with the number to start from:

    a-0b-8c-6d-7?6>

The solver takes the terms in order and keeps a running total modulo 10. A careful solution writes
one line per term, the term copied and the total after it, and boxes the last two totals:

    a-0=6b-8=8c-6=2d-7=5\boxed{25}

A hasty solver merges two terms into one line, `a-0b-8=8`. Half of the merged lines of the warm
start's corpus are slips: their total is one too high, and the later totals carry the mistake on. So
the policy that imitates the corpus fails mostly by a choice, whether to write `=` or to merge, and
reinforcement learning can undo a choice.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from tokenweights._errors import invalid
from tokenweights._typing import typed

Split = Literal["train", "easy", "hard"]
Style = Literal["careful", "mixed"]

LABELS = "abcdefghijklmnopqrstuvwxyz"
MIN_TERMS = 3
MAX_TERMS = 14
SPLIT_TERMS: dict[str, tuple[int, int]] = {"train": (5, 14), "easy": (5, 7), "hard": (12, 14)}
MERGE_PROBABILITY = 0.35
SLIP_PROBABILITY = 0.5
HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True)
class Problem:
    """One problem: its prompt, and the boxed content that answers it.

    Attributes:
        prompt: For example `a-0b-8c-6d-7?6>`.
        answer: The last two running totals, for example `25`.
        start: The digit the total starts from.
        terms: Signed digits such as `-0` and `+8`; both `+0` and `-0` occur.
    """

    prompt: str
    answer: str
    start: int
    terms: tuple[str, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """The running total after each term, modulo 10."""
        totals, total = [], self.start
        for term in self.terms:
            total = (total + int(term)) % 10
            totals.append(total)
        return tuple(totals)


@dataclass(frozen=True)
class CorpusLine:
    """One line of the warm-start corpus: a prompt and the completion to imitate."""

    prompt: str
    completion: str


@typed
def held_out(prompt: str) -> bool:
    """Whether a prompt is reserved for evaluation.

    The split is a property of the prompt's text (its SHA-256 digest), not of a seed. So no seed, no
    corpus and no training run can draw a prompt that an evaluation draws.

    Args:
        prompt: The text of a prompt.

    Returns:
        True for about one prompt in eight.

    Example:
        >>> any(held_out(p.prompt) for p in problems("train", 100, seed=0))
        False
    """
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELD_OUT_SHARE


@typed
def problem(
    seed: int,
    index: int,
    *,
    terms: tuple[int, int] = (5, 14),
    largest_digit: int = 9,
    evaluation: bool = False,
) -> Problem:
    """The problem with a given seed and index.

    The number of terms is uniform over `terms` (both ends included), and so are the start digit,
    the signs and the digits. Draws on the wrong side of `held_out` are drawn again. Nothing but the
    arguments decides the result, and no global random state is read or written.

    Args:
        seed: Names a sequence of problems.
        index: Place in the sequence.
        terms: Smallest and largest number of terms, within 3 and 14.
        largest_digit: Digits of the terms are uniform over 0 to this one.
        evaluation: Draw from the held-out prompts instead of the training prompts.

    Returns:
        The problem.

    Raises:
        TokenWeightsError: If `terms` is not an increasing pair within 3 and 14, or if
            `largest_digit` is not within 1 and 9.

    Example:
        >>> problem(0, 0, terms=(3, 3)) == problem(0, 0, terms=(3, 3))
        True
    """
    low, high = terms
    if not MIN_TERMS <= low <= high <= MAX_TERMS:
        condition = f"to satisfy {MIN_TERMS} <= low <= high <= {MAX_TERMS}"
        raise invalid("problem", "terms", condition, terms, "Pass a smaller or wider range.")
    if not 1 <= largest_digit <= 9:
        raise invalid("problem", "largest_digit", "in [1, 9]", largest_digit, "Pass a digit.")
    generator = random.Random(f"problem/{seed}/{index}")
    while True:
        count = generator.randint(low, high)
        drawn = tuple(
            generator.choice("+-") + str(generator.randint(0, largest_digit)) for _ in range(count)
        )
        start = generator.randrange(10)
        prompt = "".join(map("".join, zip(LABELS, drawn, strict=False))) + f"?{start}>"
        if held_out(prompt) == evaluation:
            totals = Problem(prompt, "", start, drawn).totals
            return Problem(prompt, f"{totals[-2]}{totals[-1]}", start, drawn)


# Functions that take or return lists are not `@typed`: the checker picks the list item it looks at
# with Python's global random state, and the lab must leave that state alone.
def problems(split: Split, count: int, *, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split.

    `train` has 5 to 14 terms, `easy` 5 to 7 and `hard` 12 to 14. Prompts of `easy` and `hard` are
    held out: none of them occurs in `train` or in the warm-start corpus.

    Args:
        split: One of `train`, `easy`, `hard`.
        count: Number of problems.
        seed: Names the sequence; the first problems of a longer list stay the same.

    Returns:
        The problems, in order.

    Raises:
        TokenWeightsError: If there is no such split.

    Example:
        >>> [len(p.terms) <= 7 for p in problems("easy", 3, seed=1)]
        [True, True, True]
    """
    if split not in SPLIT_TERMS:
        raise invalid("problems", "split", f"in {list(SPLIT_TERMS)}", repr(split), "Pick one.")
    evaluation = split != "train"
    terms = SPLIT_TERMS[split]
    return [problem(seed, i, terms=terms, evaluation=evaluation) for i in range(count)]


@typed
def careful_solution(problem: Problem) -> str:
    r"""The solution that writes every term and its total on a line of its own.

    Args:
        problem: The problem to solve.

    Returns:
        The completion, of five characters per term and ten for the box.

    Example:
        >>> careful_solution(Problem("a-0b-8c-6d-7?6>", "25", 6, ("-0", "-8", "-6", "-7")))
        'a-0=6b-8=8c-6=2d-7=5\\boxed{25}'
    """
    lines = zip(LABELS, problem.terms, problem.totals, strict=False)
    return "".join(f"{label}{term}={total}" for label, term, total in lines) + _box(problem.answer)


@typed
def mixed_solution(
    problem: Problem,
    seed: int,
    index: int,
    *,
    merge_probability: float = MERGE_PROBABILITY,
    slip_probability: float = SLIP_PROBABILITY,
) -> str:
    r"""A solution that merges some terms, and slips on some of the merged lines.

    Each line, as it begins, takes two terms with probability `merge_probability`, as long as the
    last two terms keep lines of their own. A merged line is a slip with probability
    `slip_probability`: its total is one too high, and the mistake carries on to the box.

    Args:
        problem: The problem to solve.
        seed: Names a sequence of solutions.
        index: Place in the sequence.
        merge_probability: Probability that a line merges two terms.
        slip_probability: Probability that a merged line is wrong.

    Returns:
        The completion. Its box is right exactly when no line is a slip.

    Example:
        >>> p = Problem("a-0b-8c-6d-7?6>", "25", 6, ("-0", "-8", "-6", "-7"))
        >>> mixed_solution(p, 0, 0, merge_probability=1.0, slip_probability=1.0)
        'a-0b-8=9c-6=3d-7=6\\boxed{36}'
    """
    generator = random.Random(f"mixed/{seed}/{index}")
    labelled = [label + term for label, term in zip(LABELS, problem.terms, strict=False)]
    lines, totals, total, position = [], [], problem.start, 0
    while position < len(labelled):
        room = position + 2 <= len(labelled) - 2
        merged = room and generator.random() < merge_probability
        width = 2 if merged else 1
        total += sum(map(int, problem.terms[position : position + width]))
        total += merged and generator.random() < slip_probability
        totals.append(total % 10)
        lines.append("".join(labelled[position : position + width]) + f"={total % 10}")
        position += width
    return "".join(lines) + _box(f"{totals[-2]}{totals[-1]}")


@typed
def corpus_line(
    seed: int,
    index: int,
    *,
    terms: tuple[int, int],
    style: Style,
    largest_digit: int = 9,
    merge_probability: float = MERGE_PROBABILITY,
    slip_probability: float = SLIP_PROBABILITY,
) -> CorpusLine:
    """One line of the warm-start corpus, on a training prompt.

    Args:
        seed: Names the corpus.
        index: Place in the corpus.
        terms: Smallest and largest number of terms.
        style: `careful` for correct solutions, `mixed` for merged and partly wrong ones.
        largest_digit: Digits of the terms are uniform over 0 to this one.
        merge_probability: Probability that a line of the mixed style merges two terms.
        slip_probability: Probability that a merged line is wrong.

    Returns:
        The prompt and the completion.

    Example:
        >>> corpus_line(0, 0, terms=(3, 3), style="careful").completion[-1]
        '}'
    """
    drawn = problem(seed, index, terms=terms, largest_digit=largest_digit)
    if style == "careful":
        return CorpusLine(drawn.prompt, careful_solution(drawn))
    completion = mixed_solution(
        drawn,
        seed,
        index,
        merge_probability=merge_probability,
        slip_probability=slip_probability,
    )
    return CorpusLine(drawn.prompt, completion)


@typed
def merged_lines(completion: str) -> int:
    r"""How many terms a completion merged into the line of the next term.

    Args:
        completion: A completion of the policy.

    Returns:
        The number of terms that no `=` follows, up to the box.

    Example:
        >>> merged_lines(r"a-0b-8=8c-6=2d-7=5\boxed{25}")
        1
    """
    solution = completion.split("\\")[0]
    signs = solution.count("+") + solution.count("-")
    return max(signs - solution.count("="), 0)


def _box(answer: str) -> str:
    return rf"\boxed{{{answer}}}"
