"""One run: a warm start, an arm, a seed; and what its record holds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenweights_lab import load_policy
from torch import Tensor

import tokenweights as tw
from paper.arms import Arm
from paper.engine import fast, loaded
from paper.tasks import TASKS, Question, Task, text_of, token_ids
from paper.warm_start import digest, warm_started
from tokenweights.recipes.attention import AttentionEntropy


@dataclass(frozen=True)
class Settings:
    """How the runs of a task are trained and evaluated; the same for every arm.

    Attributes:
        steps: Updates, one for each rollout.
        prompts: Prompts of a rollout.
        samples: Responses to each.
        rate: Learning rate of AdamW after three steps of warm-up; no weight decay.
        problems: Held-out problems of an evaluation.
        attempts: Responses to each of them.
        evaluated: Updates after which `hard` is evaluated, the last one included.
    """

    steps: int
    prompts: int
    samples: int
    rate: float
    problems: int
    attempts: int
    evaluated: tuple[int, ...]


SETTINGS = {
    "totals": Settings(24, 8, 8, 2e-5, 48, 4, (12, 18, 24)),
    "votes": Settings(24, 8, 8, 3e-5, 96, 4, (12, 18, 24)),
    "tripled": Settings(40, 16, 8, 3e-4, 96, 4, (20, 30, 40)),
}
TOP_P, EVALUATED_TOP_P = 0.95, 0.7


def task_of(warm_start: str) -> Task:
    """The task of a warm start, `task-number`."""
    return TASKS[warm_start.partition("-")[0]]


def warm_up(number: int) -> float:
    """The part of the learning rate that a step has."""
    return min(1, (number + 1) / 3)


def asked_at(task: Task, settings: Settings, number: int, *, seed: int) -> list[Question]:
    """The questions of a step."""
    first = number * settings.prompts
    return task.questions("train", settings.prompts, seed=seed, start=first)


def responses(rollout: Any) -> list[str]:
    """The responses as text."""
    return [text_of(row) for row in rollout.tokens.tolist()]


def rewards_of(task: Task, texts: Sequence[str], asked: Sequence[Question]) -> Tensor:
    """The reward of each response; responses to a question stand side by side."""
    samples = len(texts) // len(asked)
    return torch.tensor(
        [task.reward(text, asked[row // samples].answer) for row, text in enumerate(texts)]
    )


def evaluation(
    policy: Any, task: Task, split: str, settings: Settings, *, seed: int, top_p: float
) -> float:
    """Mean accuracy over held-out problems and attempts, the same ones for all arms of a seed."""
    asked = task.questions(split, settings.problems, seed=1000 + seed)
    rollout = fast.sampled(
        policy,
        [token_ids(question.prompt) for question in asked],
        samples=settings.attempts,
        longest=task.longest,
        generator=torch.Generator().manual_seed(2000 + seed),
        top_p=top_p,
    )
    right = rewards_of(task, responses(rollout), asked) == 1
    return right.double().mean().item()


def role_masks(task: Task, texts: Sequence[str], mask: Tensor) -> dict[str, Tensor]:
    """The tokens of each role, `batch token`."""
    rows = [task.roles(text) for text in texts]
    names = sorted({role for row in rows for role in row})
    width = mask.shape[1]
    table = [(row + [""] * width)[:width] for row in rows]
    found = {}
    for name in names:
        found[name] = torch.tensor([[role == name for role in row] for row in table]) & mask
    return found


class Readings:
    """The columns of a rollout batch that a recipe reads."""

    def __init__(self, policy: Any, recipe: tw.Recipe):
        self.policy, self.recipe = policy, recipe
        sampled = recipe.attention is None or isinstance(recipe.attention, AttentionEntropy)
        self.plain = sampled and "self_certainty" not in recipe.columns
        self.layers = recipe.layers if self.plain else ()
        self.entropy = "predictive_entropy" in recipe.columns
        self.model = None if self.plain else load_policy()
        if self.model is not None:
            self.recipe = recipe.on_model(self.model)

    def columns(self, rollout: Any) -> dict[str, Any]:
        """Columns that were read while sampling, or by a pass of the transformers model."""
        if self.model is None:
            return {
                "attention": rollout.attention or None,
                "predictive_entropy": rollout.predictive_entropy,
                "log_probs": rollout.log_probs,
                "sampler_log_probs": rollout.log_probs,  # the policy samples itself
            }
        fast.write_policy(self.policy, self.model)
        engine = loaded("engine")
        said = engine.Responses(*rollout.sequences, rollout.prompts.shape[1], [])
        return engine.columns(self.model, said, self.recipe)


@dataclass(frozen=True)
class Step:
    """A rollout and what is known of it before the update."""

    number: int
    asked: list[Question]
    rollout: Any
    texts: list[str]
    rewards: Tensor
    advantages: Tensor

    def batch(self, columns: dict[str, Any]) -> tw.RolloutBatch:
        """The rollout as a recipe sees it."""
        rows = torch.arange(len(self.texts))
        return tw.RolloutBatch(
            mask=self.rollout.mask,
            sample_ids=rows + self.number * len(rows),
            prompt_ids=rows // self.rollout.samples,
            token_ids=self.rollout.tokens,
            advantages=self.advantages,
            rewards=self.rewards,
            **columns,
        )


def rolled_out(
    policy: Any,
    task: Task,
    settings: Settings,
    number: int,
    *,
    seed: int,
    layers: Sequence[int] = (),
    entropy: bool = False,
) -> Step:
    """The rollout of a step; prompts and draws depend on seed and step only."""
    asked = asked_at(task, settings, number, seed=seed)
    rollout = fast.sampled(
        policy,
        [token_ids(question.prompt) for question in asked],
        samples=settings.samples,
        longest=task.longest,
        generator=torch.Generator().manual_seed(10_000 * seed + number),
        top_p=TOP_P,
        layers=layers,
        entropy=entropy,
    )
    texts = responses(rollout)
    rewards = rewards_of(task, texts, asked)
    advantages = fast.group_advantages(rewards, settings.samples)[:, None]
    return Step(number, asked, rollout, texts, rewards, advantages)


class Weigher:
    """The weights of an arm, its special rules included."""

    def __init__(self, policy: Any, arm: Arm, probe: int, steps: int):
        self.policy, self.arm = policy, arm
        self.readings = Readings(policy, arm.recipe(probe, steps))
        self.recipe = self.readings.recipe
        self.progress = tw.adaptive_progress(lambda step: step)
        self.rewards: list[float] = []

    def __call__(self, step: Step) -> Tensor:
        """Weights times the recipe's scale, `batch token`."""
        batch = step.batch(self.readings.columns(step.rollout))
        if self.arm.special == "alignment":
            scores = self._alignment(step)
            weighted = self.recipe.weighted_scores(scores, batch, step=step.number)
        else:
            weighted = self.recipe.weighted(batch, step=self._clock(step))
        return weighted.weights * weighted.scale

    def _clock(self, step: Step) -> int:
        if self.arm.special != "adaptive":
            return step.number
        mean = step.rewards.mean().item()
        recent = self.rewards[-3:]
        troubled = bool(recent) and mean < sum(recent) / len(recent)
        self.rewards.append(mean)
        self.progress.update(step.number, troubled=troubled)
        return self.progress.clock(step.number)

    def _alignment(self, step: Step) -> Tensor:
        """Each token's inner product with the gradient of all tokens."""
        holder = torch.nn.Module()
        holder.weights = torch.nn.ParameterList(self.policy.parameters)

        def losses() -> Tensor:
            log_probs = fast.response_log_probs(self.policy, step.rollout)
            old = step.rollout.log_probs
            advantages = step.advantages.expand(log_probs.shape)
            return tw.clipped_surrogate_loss(log_probs, old, advantages)

        if not bool((step.advantages != 0).any()):
            return torch.zeros(step.rollout.mask.shape)
        # The ranks count, not the sizes: where the gradient is small, float32 leaves a few percent.
        aligned = tw.token_alignment(losses, holder, mask=step.rollout.mask, tolerance=0.2)
        return aligned.inner.float()


def train(
    warm_start: str,
    arm: Arm,
    seed: int,
    settings: Settings,
    *,
    watch: Callable[[Any, Step], None] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates; the part of the record that is measured.

    Args:
        warm_start: Its name.
        arm: The rule.
        seed: Of prompts, draws and held-out problems.
        settings: Those of the task.
        watch: Called with the policy and each rollout before its update, and once at the end.

    Returns:
        Histories, evaluations, shares of the weight by role, and CPU seconds.
    """
    clock, task = time.process_time(), task_of(warm_start)
    policy = warm_started(warm_start)
    start = digest(policy.parameters)
    weigh = Weigher(policy, arm, task.probe, settings.steps)
    optimizer = torch.optim.AdamW(policy.parameters, weight_decay=0.0, fused=True)
    history: dict[str, list[float]] = {"reward": [], "length": [], "gradient": [], "unboxed": []}
    evaluations, roles = [], _Roles(task)
    read = {"layers": weigh.readings.layers, "entropy": weigh.readings.entropy}
    if watch is not None:
        read = {"layers": range(len(policy.layers)), "entropy": True}
    if 0 in settings.evaluated:
        last = not settings.steps
        evaluations.append({"step": 0, **accuracies(policy, task, settings, seed=seed, last=last)})
    for number in range(settings.steps):
        step = rolled_out(policy, task, settings, number, seed=seed, **read)
        if watch is not None:
            watch(policy, step)
        weights = weigh(step)
        if number % 4 == 0:
            roles.add(step, weights)
        optimizer.zero_grad()
        fast.accumulate_gradient(policy, step.rollout, step.advantages * weights)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.param_groups[0]["lr"] = settings.rate * warm_up(number)
        optimizer.step()
        _note(history, step, norm.item())
        if number + 1 in settings.evaluated:
            last = number + 1 == settings.steps
            found = accuracies(policy, task, settings, seed=seed, last=last)
            evaluations.append({"step": number + 1, **found})
    if watch is not None:
        watch(policy, rolled_out(policy, task, settings, settings.steps, seed=seed, **read))
    return {
        "warm_start_digest": start,
        "history": {name: [round(v, 4) for v in values] for name, values in history.items()},
        "evaluations": evaluations,
        "roles": roles.shares(),
        "cpu_seconds": round(time.process_time() - clock, 2),
    }


def accuracies(
    policy: Any, task: Task, settings: Settings, *, seed: int, last: bool
) -> dict[str, float]:
    """Accuracy on hard problems; at the end also on easy ones, and without a nucleus."""

    def accuracy(split: str, top_p: float) -> float:
        return round(evaluation(policy, task, split, settings, seed=seed, top_p=top_p), 4)

    found = {"hard": accuracy("hard", EVALUATED_TOP_P)}
    if last:
        found["easy"] = accuracy("easy", EVALUATED_TOP_P)
        found["hard_whole"] = accuracy("hard", 1.0)
    return found


def _note(history: dict[str, list[float]], step: Step, norm: float) -> None:
    history["reward"].append(step.rewards.mean().item())
    history["length"].append(step.rollout.mask.sum(-1).double().mean().item())
    history["gradient"].append(norm)
    history["unboxed"].append((step.rewards == -2).double().mean().item())


class _Roles:
    """Shares of tokens and of weight by role, over the steps that were added."""

    def __init__(self, task: Task):
        self.task, self.tokens, self.weights = task, {}, {}

    def add(self, step: Step, weights: Tensor) -> None:
        masks = role_masks(self.task, step.texts, step.rollout.mask)
        for role, mask in masks.items():
            self.tokens[role] = self.tokens.get(role, 0.0) + mask.sum().item()
            self.weights[role] = self.weights.get(role, 0.0) + weights[mask].sum().item()

    def shares(self) -> dict[str, dict[str, float]]:
        found = {}
        for name, totals in (("tokens", self.tokens), ("weight", self.weights)):
            total = sum(totals.values()) or 1.0
            found[name] = {role: round(value / total, 4) for role, value in totals.items()}
        return found
