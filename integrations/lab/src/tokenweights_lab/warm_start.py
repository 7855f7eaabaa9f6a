"""The warm start: two phases of supervised training that make the embedded policy from nothing.

    python -m tokenweights_lab.warm_start --output policy

The first phase teaches the procedure on careful solutions, shortest problems first. The second
imitates the mixed corpus and so brings in the bad habit that reinforcement learning removes.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from tokenweights._typing import typed
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tokenweights_lab.policy import generation_config, untrained_policy
from tokenweights_lab.task import (
    MAX_TERMS,
    MERGE_PROBABILITY,
    MIN_TERMS,
    SLIP_PROBABILITY,
    CorpusLine,
    Style,
    corpus_line,
)
from tokenweights_lab.tokenizer import character_tokenizer

METADATA_KEY = "warm_start"


@dataclass(frozen=True)
class Phase:
    """One phase of supervised training.

    Attributes:
        steps: Optimiser steps.
        style: Style of the solutions.
        term_weights: Relative frequency of problems with 3, 4, ... 14 terms.
        curriculum_steps: Steps after which the largest number of terms grows by one, from 3, and
            the largest digit, from 1; 0 allows every problem from the start.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps of linear warm-up.
        decay_share: Share of the steps, at the end, over which the rate falls to zero.
        batch_size: Corpus lines per step.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Gradient norm above which gradients are scaled down.
        merge_probability: Probability that a line of the mixed style merges two terms.
        slip_probability: Probability that a merged line is wrong.
    """

    steps: int
    style: Style
    term_weights: tuple[float, ...]
    curriculum_steps: int = 0
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.4
    batch_size: int = 32
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    merge_probability: float = MERGE_PROBABILITY
    slip_probability: float = SLIP_PROBABILITY


@dataclass(frozen=True)
class WarmStart:
    """The whole warm start: a seed and the phases, in order."""

    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(
            steps=700,
            style="careful",
            term_weights=(2, 2, 2, 2, 2, 1, 1, 0.7, 0.7, 0.7, 0.7, 0.7),
            curriculum_steps=50,
        ),
        Phase(
            steps=400,
            style="mixed",
            term_weights=(2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1),
        ),
    )

    def to_json(self) -> str:
        """The configuration as a JSON string; equal configurations give equal strings."""
        return json.dumps(asdict(self), sort_keys=True)


@typed
def learning_rate_factor(phase: Phase, step: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, constant, linear decay.

    Args:
        phase: The phase.
        step: Number of steps already taken.

    Returns:
        A value in [0, 1].

    Example:
        >>> phase = Phase(steps=10, style="careful", term_weights=(1.0,) * 12, warmup_steps=2)
        >>> [round(learning_rate_factor(phase, step), 2) for step in (0, 1, 5, 8, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.25]
    """
    warm_up = (step + 1) / max(phase.warmup_steps, 1)
    decay = (phase.steps - step) / max(phase.decay_share * phase.steps, 1)
    return min(1.0, warm_up, decay)


def phase_batch(phase: Phase, seed: int, step: int) -> list[CorpusLine]:
    """The corpus lines of one step.

    Args:
        phase: The phase.
        seed: Seed of the phase's corpus.
        step: Number of steps already taken.

    Returns:
        `phase.batch_size` lines.

    Example:
        >>> phase = Phase(steps=1, style="careful", term_weights=(1.0,) * 12, batch_size=4)
        >>> len(phase_batch(phase, 0, 0))
        4
    """
    stage = step // phase.curriculum_steps if phase.curriculum_steps else MAX_TERMS
    counts = range(MIN_TERMS, min(MIN_TERMS + stage, MAX_TERMS) + 1)
    # With all ten digits from the start a total says nothing about the one before it, and the
    # first steps find no slope to follow; with digits 0 and 1 it says a lot.
    largest_digit = min(1 + stage, 9)
    lines = []
    for index in range(step * phase.batch_size, (step + 1) * phase.batch_size):
        generator = random.Random(f"terms/{seed}/{index}")
        (terms,) = generator.choices(counts, phase.term_weights[: len(counts)])
        line = corpus_line(
            seed,
            index,
            terms=(terms, terms),
            style=phase.style,
            largest_digit=largest_digit,
            merge_probability=phase.merge_probability,
            slip_probability=phase.slip_probability,
        )
        lines.append(line)
    return lines


def batch_tensors(
    lines: list[CorpusLine], tokenizer: PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Token ids of prompt and completion, and the mask of the tokens to imitate.

    Args:
        lines: Corpus lines.
        tokenizer: The character tokenizer.

    Returns:
        Ids, right-padded with the pad token, and a mask that is True on completion tokens, the
        final `<eos>` among them.

    Example:
        >>> ids, mask = batch_tensors([CorpusLine("?1>", "a")], character_tokenizer())
        >>> mask.tolist()
        [[False, False, False, True, True]]
    """
    prompts = tokenizer([line.prompt for line in lines]).input_ids
    completions = tokenizer([line.completion for line in lines]).input_ids
    rows = [p + c + [tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    positions = torch.arange(width)
    return ids, (positions >= starts) & (positions < ends)


@typed
def imitation_loss(
    model: Qwen3ForCausalLM, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of the masked tokens, in nats.

    Args:
        model: The policy.
        ids: Token ids, right-padded.
        mask: True on the tokens to imitate; padding lies after them and so is never attended to.

    Returns:
        A scalar with gradients.
    """
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = mask[:, 1:]
    return torch.nn.functional.cross_entropy(logits[targets], ids[:, 1:][targets])


@typed
def warm_started_policy(
    configuration: WarmStart | None = None, *, progress: bool = False
) -> Qwen3ForCausalLM:
    """The policy after its warm start, trained from nothing on the CPU.

    Reruns on the same machine with the same number of threads give the same parameters. The
    global random state is left as it was.

    Args:
        configuration: What to run; the configuration of the embedded policy if None.
        progress: Show a progress bar.

    Returns:
        The trained float32 model, in evaluation mode.

    Example:
        >>> phase = Phase(steps=1, style="careful", term_weights=(1.0,) * 12, batch_size=2)
        >>> warm_started_policy(WarmStart(phases=(phase,))).training
        False
    """
    configuration = configuration or WarmStart()
    tokenizer = character_tokenizer()
    model = untrained_policy(seed=configuration.seed).train()
    total = sum(phase.steps for phase in configuration.phases)
    with tqdm(total=total, disable=not progress, unit="step") as bar:
        for number, phase in enumerate(configuration.phases):
            # Each phase has a corpus of its own and a fresh optimiser.
            seed = 1000 * configuration.seed + number
            for loss in _losses(model, tokenizer, phase, seed):
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _losses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int
) -> Iterable[Tensor]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, weight_decay=phase.weight_decay
    )
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * learning_rate_factor(phase, step)
        ids, mask = batch_tensors(phase_batch(phase, seed, step), tokenizer)
        loss = imitation_loss(model, ids, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), phase.max_grad_norm)
        optimizer.step()
        yield loss.detach()


@typed
def write_policy(model: Qwen3ForCausalLM, configuration: WarmStart, directory: Path) -> None:
    """Writes a policy, its tokenizer and the configuration that made it.

    The configuration is a JSON string in the metadata of `model.safetensors`, under `warm_start`.

    Args:
        model: The trained policy.
        configuration: The warm start that trained it.
        directory: Where to write; made if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.save_pretrained(directory)
    generation_config().save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    portable = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(portable, indent=2, sort_keys=True) + "\n")
    # The output head is tied to the embedding, so `named_parameters` lists the matrix once.
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    metadata = {"format": "pt", METADATA_KEY: configuration.to_json()}
    save_file(tensors, directory / "model.safetensors", metadata=metadata)


def main() -> None:
    """Trains the policy and writes it."""
    parser = argparse.ArgumentParser(description="Train the lab's policy from nothing.")
    parser.add_argument("--output", type=Path, default=Path("policy"), help="directory to write")
    output = parser.parse_args().output
    configuration = WarmStart()
    write_policy(warm_started_policy(configuration, progress=True), configuration, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
