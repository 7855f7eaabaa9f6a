"""Token records of a run's rollout batches, every so many steps."""

from collections.abc import Callable
from dataclasses import replace

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.recipes import Recipe, RolloutBatch, WeightedRollout
from tokenweights.report.records import TokenRecord, append_token_records, token_records


class RolloutRecords:
    """Appends token records of some prompts' responses to a file, every so many training steps.

    Args:
        path: JSONL file; None records nothing.
        every: Training steps between two recorded rollout batches.
        prompts: Number of prompts whose responses are recorded, the first of a batch.
        enriched: Adds to a record what only a model can say, such as what its tokens attended to;
            called where records are written.

    Example:
        >>> RolloutRecords(None, every=100).due(0)
        False
    """

    @typed
    def __init__(
        self,
        path: str | None,
        *,
        every: int,
        prompts: int = 1,
        enriched: Callable[[TokenRecord], TokenRecord] | None = None,
    ) -> None:
        self._path, self._every = path, every
        self._prompts, self._enriched = prompts, enriched
        self._next_step = 0

    @typed
    def due(self, step: int) -> bool:
        """Whether the rollout batch of a step is one to record.

        Args:
            step: Training step.

        Returns:
            Whether so many steps have passed since the last.
        """
        return self._path is not None and step >= self._next_step

    @typed
    def append(
        self,
        recipe: Recipe,
        batch: RolloutBatch,
        weighted: WeightedRollout,
        *,
        step: int,
        prompt: Callable[[int], str],
        decode: Callable[[list[int]], str],
        detailed: Callable[[RolloutBatch, list[int]], RolloutBatch] | None = None,
        write: bool = True,
    ) -> None:
        """Appends the responses to the first prompts of a batch, if its step is due.

        Where several ranks hold parts of the batch, all of them call and one writes.

        Args:
            recipe: The recipe, with its layers numbered.
            batch: The batch, with token ids, advantages and attention; what else a record can hold
                is written where it is there.
            weighted: What the recipe made of it.
            step: Training step.
            prompt: Text of the prompt of a row.
            decode: Turns a list of token ids into text.
            detailed: Adds to the recorded rows, given with their numbers in the batch, what costs
                too much for all of them; called on every rank, with at least one row.
            write: Whether this rank is the one that writes.

        Raises:
            TokenWeightsError: If the recipe reads no attention.
        """
        if self._path is None or not self.due(step) or not weighted.metrics:
            return
        attention = recipe.entropy
        if attention is None or batch.token_ids is None:
            hint = "A record holds attention entropies and tokens."
            raise invalid(
                "RolloutRecords", "recipe", "that reads attention entropy", recipe.name, hint
            )
        self._next_step = step + self._every
        rows = first_prompt_rows(batch, prompts=self._prompts)
        shown = batch.rows(rows or [0])
        shown = detailed(shown, rows or [0]) if detailed else shown
        if not write or not rows:
            return
        shown.require(["sample_ids"], caller="RolloutRecords")
        assert shown.token_ids is not None and shown.sample_ids is not None
        records = token_records(
            attention(shown),
            shown.mask,
            step=step,
            sample_ids=shown.sample_ids,
            prompts=[prompt(row) for row in rows],
            token_ids=shown.token_ids,
            decode=decode,
            weights=weighted.weights[rows],
            advantages=None if shown.advantages is None else shown.advantages.float(),
            layer=recipe.layers,
            entropy_kind=attention.entropy_kind,
            alignment=attention.alignment,
            predictive_entropy=shown.predictive_entropy,
            log_probs=shown.log_probs,
        )
        if batch.rewards is not None:
            given = batch.rewards[rows].tolist()
            records = [replace(r, reward=value) for r, value in zip(records, given, strict=True)]
        if self._enriched is not None:
            records = [self._enriched(record) for record in records]
        append_token_records(self._path, records)


@typed
def first_prompt_rows(batch: RolloutBatch, *, prompts: int = 1) -> list[int]:
    """Numbers of the rows that answer the first prompts that have a row with a valid token.

    Args:
        batch: The batch.
        prompts: Number of prompts.

    Returns:
        Numbers of rows with a valid token; empty if there is none.

    Raises:
        TokenWeightsError: If the batch has no prompt ids.
    """
    batch.require(["prompt_ids"], caller="first_prompt_rows")
    assert batch.prompt_ids is not None
    answered, real = batch.prompt_ids.tolist(), batch.mask.any(-1).tolist()
    there = [prompt for prompt, valid in zip(answered, real, strict=True) if valid]
    first = [*dict.fromkeys(there)][:prompts]
    places = enumerate(zip(answered, real, strict=True))
    return [row for row, (prompt, valid) in places if valid and prompt in first]
