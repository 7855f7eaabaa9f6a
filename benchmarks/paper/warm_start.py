"""Warm starts: the embedded policy, one like it from another seed, and one for each other task.

    python benchmarks/paper warm-start totals-1

trains one again. The trained ones are stored in half precision under `policies/`, so that every
machine starts from the same weights.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenweights_lab import load_policy
from tokenweights_lab.policy import untrained_policy
from tokenweights_lab.warm_start import WarmStart, learning_rate_factor, phase_batch
from torch import Tensor

from paper.engine import fast
from paper.tasks import TASKS, Question, token_ids

FOLDER = Path(__file__).parent / "policies"
Pair = tuple[str, str]  # a prompt and the completion to imitate


@dataclass(frozen=True)
class Phase:
    """One phase of supervised training on pairs that a function draws.

    Attributes:
        pairs: The pairs of a step.
        rates: The learning rate of each step; their number is that of the steps.
        spread: The layer at which the attention of the last decision is spread; None for none.
    """

    pairs: Callable[[int], list[Pair]]
    rates: tuple[float, ...]
    spread: int | None = None


def ramp(rate: float, steps: int) -> tuple[float, ...]:
    """Thirty steps up, and down to zero over the last two fifths."""
    return tuple(rate * min(1, (s + 1) / 30, (steps - s) / (0.4 * steps)) for s in range(steps))


def rollout_of(pairs: list[Pair]) -> object:
    """Pairs as a rollout of one sample to each prompt."""
    ids, real = fast.padded([token_ids(prompt) for prompt, _ in pairs])
    rows = [[*token_ids(completion), fast.END] for _, completion in pairs]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [fast.PAD] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return fast.Rollout(ids, real, tokens, mask, torch.zeros(mask.shape), None, {})


def imitate(policy, phase: Phase) -> Iterator[float]:
    """Trains a policy on a phase; the mean negative log-likelihood of each step, nats."""
    optimizer = torch.optim.AdamW(policy.parameters, weight_decay=0.01)
    for step, rate in enumerate(phase.rates):
        optimizer.param_groups[0]["lr"] = rate
        rollout = rollout_of(phase.pairs(step))
        loss = -fast.response_log_probs(policy, rollout)[rollout.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
        yield loss.item()


def drawn(task: str, seed: int, slip: Callable[[Question], str] | None, share: float):
    """A phase's pairs: solutions of training questions, a share of them with a slip."""

    def pairs(step: int) -> list[Pair]:
        found = []
        for index in range(step * 32, step * 32 + 32):
            question = TASKS[task].question("train", seed, index)
            slips = random.Random(f"slip/{seed}/{index}").random() < share
            solution = slip(question) if slip and slips else question.solution
            found.append((question.prompt, solution))
        return found

    return pairs


def wrong_verdict(question: Question) -> str:
    """The solution of a vote with the rarer sign."""
    return question.solution[:-1] + ("-" if question.answer == "+" else "+")


def _lab_phases(seed: int) -> list[Phase]:
    def phase(number, settings) -> Phase:
        def pairs(step: int) -> list[Pair]:
            lines = phase_batch(settings, 1000 * seed + number, step)
            return [(line.prompt, line.completion) for line in lines]

        rate = settings.learning_rate
        steps = range(settings.steps)
        rates = tuple(rate * learning_rate_factor(settings, step) for step in steps)
        return Phase(pairs, rates)

    return [phase(number, each) for number, each in enumerate(WarmStart().phases)]


def _totals_again():
    return fast.policy_of(untrained_policy(seed=1)), _lab_phases(1)


def _votes():
    clean = Phase(drawn("votes", 77, None, 0), ramp(2e-3, 200))
    # A third of the verdicts are wrong, at random: the policy knows, and hardly says so.
    noisy = Phase(drawn("votes", 78, wrong_verdict, 0.3), ramp(3e-4, 80))
    even = Phase(noisy.pairs, (5e-4,) * 80, spread=TASKS["votes"].probe)
    return fast.policy_of(load_policy()), [clean, noisy, even]


def gather_evenly(policy, phase: Phase, layer: int) -> Iterator[float]:
    """Imitates, and spreads the attention that decides the verdict; changes the policy in place.

    Without it a policy may reach the verdict through few positions, and it would be no explorer.
    """
    model = load_policy(attn_implementation="eager")
    fast.write_policy(policy, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.rates[0], weight_decay=0.0)
    for step in range(len(phase.rates)):
        rollout = rollout_of(phase.pairs(step))
        ids, real = rollout.sequences
        output = model(ids, attention_mask=real.long(), output_attentions=True, use_cache=False)
        start = rollout.prompts.shape[1] - 1
        log_probs = output.logits[:, start:-1].log_softmax(-1)
        chosen = log_probs.gather(-1, rollout.tokens[..., None])[..., 0]
        # The last token but one, the end being the last: all responses have one length.
        shares = output.attentions[layer].mean(1)[:, start + rollout.tokens.shape[1] - 2]
        # Of a padded key the share is 0, where the slope of x log x is infinite.
        entropy = -(shares * shares.clamp(min=1e-9).log()).sum(-1) / real[:, :-2].sum(-1).log()
        loss = -chosen[rollout.mask].mean() - 0.3 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    made = fast.policy_of(model)
    with torch.no_grad():
        for weight, value in zip(policy.parameters, made.parameters, strict=True):
            weight.copy_(value)


def _tripled():
    # Stopped while half of the arithmetic is still wrong, greedy answers included.
    rates = tuple(1e-3 * min(1, (step + 1) / 30) for step in range(84))
    return fast.policy_of(load_policy()), [Phase(drawn("tripled", 77, None, 0), rates)]


MADE = {"totals-1": _totals_again, "votes-0": _votes, "tripled-0": _tripled}
NAMES = ("totals-0", *MADE)


def path_of(name: str) -> Path:
    """Where a trained warm start is stored."""
    return FOLDER / f"{name}.safetensors"


def make(name: str, progress: Callable[[str], None] = print) -> None:
    """Trains a warm start and stores it, from a seed and nothing else."""
    policy, phases = MADE[name]()
    for number, phase in enumerate(phases):
        spread = phase.spread
        losses = imitate(policy, phase) if spread is None else gather_evenly(policy, phase, spread)
        for step, loss in enumerate(losses):
            if step % 50 == 49:
                progress(f"{name}: phase {number}, step {step + 1}, loss {loss:.3f}")
    weights = {f"{n:02}": each.detach().half() for n, each in enumerate(policy.parameters)}
    FOLDER.mkdir(exist_ok=True)
    save_file(weights, path_of(name))


def warm_started(name: str):
    """A fresh copy of a warm start, `task-number`."""
    policy = fast.policy_of(load_policy())
    if name in MADE:
        stored = load_file(path_of(name))
        with torch.no_grad():
            for weight, key in zip(policy.parameters, sorted(stored), strict=True):
                weight.copy_(stored[key].float())
    return policy


def digest(parameters: list[Tensor]) -> str:
    """Eight digits that stand for weights."""
    found = hashlib.sha256()
    for weight in parameters:
        found.update(weight.detach().numpy().tobytes())
    return found.hexdigest()[:8]
