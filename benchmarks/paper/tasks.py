"""The three tasks: what is asked, what is right, and what each token of a response is for."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tokenweights_lab.task import held_out, problem
from tokenweights_lab.tokenizer import VOCABULARY

from tokenweights import boxed_match_reward

INDEX = {token: index for index, token in enumerate(VOCABULARY)}
LABELS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and the solution without a mistake."""

    prompt: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Task:
    """A source of questions, and the names of its token roles.

    Attributes:
        name: Of the task.
        about: One sentence on what decides the reward.
        question: The question with a seed and an index in a split; `train`, `easy` or `hard`.
        roles: The role of every character of a response, and of its end.
        decisive: The roles that are decisions of the policy.
        reward: Of a response and the answer: 1, -1, or -2 without an answer.
        longest: Most tokens of a response.
        probe: The layer that attention entropy is read at, chosen by the role table of the warm
            start where the middle layer does not rank the decisive tokens as the task asks.
    """

    name: str
    about: str
    question: Callable[[str, int, int], Question]
    roles: Callable[[str], list[str]]
    decisive: tuple[str, ...]
    reward: Callable[[str, str], float]
    longest: int
    probe: int

    def questions(self, split: str, count: int, *, seed: int, start: int = 0) -> list[Question]:
        """Questions of a split from an index on."""
        return [self.question(split, seed, start + index) for index in range(count)]


def token_ids(text: str) -> list[int]:
    """The tokens of a text, one for each character."""
    return [INDEX[character] for character in text]


def text_of(tokens: list[int]) -> str:
    """The text of tokens, without padding and end."""
    return "".join(VOCABULARY[token] for token in tokens if token > 1)


# Running totals: the embedded task of the lab.

_TOTAL_TERMS = {"train": (5, 14), "easy": (5, 7), "hard": (12, 14)}


def total_question(split: str, seed: int, index: int) -> Question:
    """The lab's problem."""
    drawn = problem(seed, index, terms=_TOTAL_TERMS[split], evaluation=split != "train")
    lines = zip(LABELS, drawn.terms, drawn.totals, strict=False)
    solution = "".join(f"{label}{term}={total}" for label, term, total in lines)
    return Question(drawn.prompt, drawn.answer, rf"{solution}\boxed{{{drawn.answer}}}")


def total_roles(text: str) -> list[str]:
    """Where a response chooses between `=` and merging, copies, adds, or boxes."""
    roles = []
    for at, character in enumerate(text):
        before, earlier = text[at - 1] if at else "", text[at - 2] if at > 1 else ""
        if "\\" in text[: at + 1]:
            roles.append("box")
        elif before.isdigit() and earlier in ("+", "-"):
            roles.append("choice")
        elif before == "=":
            merged = sum(each in "+-" for each in text[:at].rstrip("=").rpartition("=")[2]) > 1
            roles.append("total after merge" if merged else "total")
        elif character.isdigit():
            roles.append("copied digit")
        else:
            roles.append("sign" if character in "+-" else "label")
    return [*roles, "box"]


# Votes: the sign that most terms of the prompt have.

_VOTES = {"train": (23, 29, 35, 41), "easy": (23, 29), "hard": (41,)}


def vote_question(split: str, seed: int, index: int) -> Question:
    """Four labelled digits to copy, a row of signs, and the verdict: which sign is commoner."""
    generator = random.Random(f"votes/{split}/{seed}/{index}")
    while True:
        count = generator.choice(_VOTES[split])
        signs = "".join(generator.choice("+-") for _ in range(count))
        copied = "".join(f"{label}{generator.randrange(10)}" for label in LABELS[:4])
        prompt, margin = f"{copied}?{signs}>", 2 * signs.count("+") - count
        if abs(margin) >= 3 and held_out(prompt) == (split != "train"):
            break
    answer = "+" if margin > 0 else "-"
    return Question(prompt, answer, f"{copied}={answer}")


def vote_roles(text: str) -> list[str]:
    """The verdict, and what is copied before it."""
    roles = []
    for at, character in enumerate(text):
        if at and text[at - 1] == "=":
            roles.append("verdict")
        else:
            roles.append("copied digit" if character.isdigit() else "label")
    return [*roles, "end"]


# Tripled totals: arithmetic that the policy cannot do yet.

_TRIPLED = {"train": (1, 2), "easy": (1, 1), "hard": (2, 2)}


def tripled_question(split: str, seed: int, index: int) -> Question:
    """Each total is three times the one before plus the term, modulo ten; the last one counts."""
    generator = random.Random(f"tripled/{split}/{seed}/{index}")
    while True:
        count, first = generator.randint(*_TRIPLED[split]), generator.randrange(24)
        terms = [f"+{generator.randrange(5)}" for _ in range(count)]
        labels, start = LABELS[first:], generator.randrange(10)
        prompt = "".join(map("".join, zip(labels, terms, strict=False))) + f"?{start}>"
        if held_out(prompt) == (split != "train"):
            break
    totals, total = [], start
    for term in terms:
        total = (3 * total + int(term)) % 10
        totals.append(total)
    lines = "".join(f"{a}{b}={c}" for a, b, c in zip(labels, terms, totals, strict=False))
    return Question(prompt, str(totals[-1]), lines)


def tripled_roles(text: str) -> list[str]:
    """Totals, and what is copied between them."""
    roles = []
    for at, character in enumerate(text):
        if at and text[at - 1] == "=":
            roles.append("total")
        elif character.isdigit():
            roles.append("copied digit")
        else:
            roles.append("mark" if character in "+-=" else "label")
    return [*roles, "end"]


def ending_reward(text: str, answer: str) -> float:
    """1 for the right character after the last `=`, -1 for a wrong one, -2 for none."""
    _, equals, said = text.rpartition("=")
    return -2.0 if not equals else 1.0 if said == answer else -1.0


TASKS = {
    task.name: task
    for task in (
        Task(
            name="totals",
            about="a choice after every term: write `=`, or merge two terms and slip half the time",
            question=total_question,
            roles=total_roles,
            decisive=("choice", "total after merge"),
            reward=boxed_match_reward,
            longest=81,
            probe=2,
        ),
        Task(
            name="votes",
            about="one verdict that has to gather the signs of all terms of the prompt",
            question=vote_question,
            roles=vote_roles,
            decisive=("verdict",),
            reward=ending_reward,
            longest=12,
            probe=2,
        ),
        Task(
            name="tripled",
            about="totals that the policy cannot compute yet",
            question=tripled_question,
            roles=tripled_roles,
            decisive=("total",),
            reward=ending_reward,
            longest=14,
            probe=2,
        ),
    )
}
