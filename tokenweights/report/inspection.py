"""One response looked at with a model: every statistic of every token, as token records."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention import (
    ENTROPY_KINDS,
    EntropyKind,
    StatisticKind,
    attention_statistics,
    attention_weights,
)
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.recipes import Recipe, RolloutBatch, require_columns
from tokenweights.recipes.attention import Alignment
from tokenweights.recipes.backward import AttentionReading, joined_readings
from tokenweights.report.records import TokenRecord, token_records
from tokenweights.signals import predictive_entropy

SUPPORT_MASS = (0.5, 0.8, 0.9, 0.95)
_SPANS: tuple[StatisticKind, ...] = ("mean_distance", "local_mass", "max_weight")
_KINDS: tuple[StatisticKind, ...] = (*ENTROPY_KINDS, "support_size", *_SPANS)
# Columns of a rollout batch that one response has.
RESPONSE_COLUMNS = ("token_ids", "attention", "log_probs", "predictive_entropy")
_WEIGHT_ROWS = 64  # rows of weights in memory at once


@dataclass
class _Layer:
    """What one layer has shown so far: a tensor per chunk and column, and rows of attention."""

    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    places: list[tuple[int, ...]] = field(default_factory=list)
    weights: list[tuple[float, ...]] = field(default_factory=list)

    def values(self, name: str, rows: slice) -> Tensor:
        return torch.cat(self.columns[name])[rows]


@typed
def inspected_records(
    model: nn.Module,
    token_ids: Int[Tensor, " token"],
    *,
    prompt_length: int,
    decode: Callable[[list[int]], str],
    layers: Sequence[int],
    entropy_kind: EntropyKind = "normalized",
    alignment: Alignment = "deciding",
    largest: int = 32,
    local_window: int = 128,
    chunk_tokens: int = 256,
    progress: Callable[[int], Any] | None = None,
) -> list[TokenRecord]:
    """Everything the library can say about a prompt and its response, one record for each layer.

    The model reads the sequence once, in chunks over its own cache, so that memory holds the
    logits of one chunk and never an attention matrix. Each record has log-probabilities and
    predictive entropies at temperature 1, groups of bottom and top 20 %, the largest attention
    weights of each token, and the columns `support_size_0.5`, `_0.8`, `_0.9`, `_0.95`,
    `mean_distance`, `local_mass_128`, `max_weight` and `<kind>_entropy` for the other three kinds.

    Args:
        model: A transformers language model in evaluation mode.
        token_ids: Prompt and response.
        prompt_length: Number of prompt tokens, at least 1.
        decode: Turns a list of token ids into text.
        layers: Layer indices; negative ones count from the last attention layer.
        entropy_kind: The attention entropy of the records.
        alignment: Whose attention row stands for a token: the one `"deciding"` it, or its `"own"`.
        largest: Attention weights recorded for each token; all of a short context.
        local_window: Keys at a smaller distance than this count as local; the column says it.
        chunk_tokens: Tokens read at a time.
        progress: Called with the number of tokens after each chunk.

    Returns:
        Records with the layer's index as `sample_id`.

    Raises:
        TokenWeightsError: If there is no prompt or no response, as `capture_attention`, or if the
            model keeps no cache.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=16,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ...     num_key_value_heads=1,
        ...     head_dim=8,
        ... )
        >>> model = Qwen3ForCausalLM(config).eval()
        >>> (record,) = inspected_records(
        ...     model, torch.tensor([1, 2, 3]), prompt_length=1, decode=str, layers=[-1]
        ... )
        >>> record.layer, record.tokens, record.attended
        (1, ('[2]', '[3]'), ((0,), (0, 1)))
    """
    total = len(token_ids)
    if not 1 <= prompt_length < total:
        hint = "A prompt token decides the first token of the response."
        condition = f"from 1 to {total - 1}, the tokens less one"
        raise invalid("inspected_records", "prompt_length", condition, prompt_length, hint)
    for name, value in (("largest", largest), ("chunk_tokens", chunk_tokens)):
        if value < 1:
            raise invalid("inspected_records", name, ">= 1", value, "Pass a number of tokens.")
    first = prompt_length - 1  # the first row that is read: it decides the first response token
    found: dict[int, _Layer] = {}
    end = 0

    def reduce(captured: CapturedAttention) -> None:
        rows = min(end - first, captured.query.shape[2])
        if rows > 0:
            layer = found.setdefault(captured.layer, _Layer())
            _add_rows(layer, captured, rows, end, largest=largest, local_window=local_window)

    # The name of a cache since transformers 5.24, and before.
    named = inspect.signature(model.forward).parameters
    kept = "cache" if "cache" in named else "past_key_values"
    entropies, log_probs, cache = [], [], None
    with torch.no_grad(), capture_attention(model, layers, reduce=reduce) as capture:
        order = list(capture.calls)
        for start in range(0, total, chunk_tokens):
            end = min(start + chunk_tokens, total)
            given = {} if cache is None else {kept: cache}
            output = model(token_ids[None, start:end], use_cache=True, **given)
            cache = getattr(output, kept)
            if cache is None and end < total:
                hint = "Read it in one chunk: raise `chunk_tokens`."
                raise invalid("inspected_records", "model", "with a cache", "none", hint)
            logits = output.logits[:, max(first - start, 0) :]
            if end > first:
                entropies.append(predictive_entropy(logits)[0].cpu())
                following = token_ids[max(first, start) + 1 : end + 1]
                shares = logits[0, : len(following)].float().log_softmax(-1)
                log_probs.append(shares.gather(-1, following[:, None])[:, 0].cpu())
            if progress is not None:
                progress(end - start)
    rows = slice(0, total - prompt_length)
    prompt, response = token_ids[:prompt_length].tolist(), token_ids[prompt_length:].cpu()
    read = slice(rows.start, rows.stop) if alignment == "deciding" else slice(1, rows.stop + 1)
    records = []
    for index in order:
        layer = found[index]
        (record,) = token_records(
            layer.values(f"{entropy_kind}_entropy", read)[None],
            torch.ones(1, len(response), dtype=torch.bool),
            step=0,
            sample_ids=torch.tensor([index]),
            prompts=[decode(prompt)],
            token_ids=response[None],
            decode=decode,
            layer=index,
            entropy_kind=entropy_kind,
            alignment=alignment,
            # Both belong to the distribution that a token was drawn from, whatever the alignment.
            predictive_entropy=torch.cat(entropies)[None, rows],
            log_probs=torch.cat(log_probs)[None, rows],
        )
        others = [name for name in layer.columns if name != f"{entropy_kind}_entropy"]
        columns = {name: tuple(layer.values(name, read).tolist()) for name in others}
        records.append(
            replace(
                record,
                columns=columns,
                prompt_tokens=tuple(decode([token]) for token in prompt),
                attended=tuple(layer.places[read]),
                attended_weights=tuple(layer.weights[read]),
            )
        )
    return records


@torch.no_grad()
def response_readings(
    model: nn.Module, token_ids: Int[Tensor, " token"], made: Recipe, *, response_length: int
) -> dict[int | str, Tensor]:
    """What a recipe reads of attention beside entropies, of each response token, `token`.

    Later queries count towards a column, so the decoder reads the whole sequence at once; no
    logits and no attention matrix are kept.

    Args:
        model: A transformers language model in evaluation mode.
        token_ids: Prompt and response.
        made: The recipe, with its layers numbered.
        response_length: Number of response tokens.

    Returns:
        The columns of `RolloutBatch.attention` by name; none of a recipe that reads entropies only.
    """
    asked = made.attention
    if not isinstance(asked, AttentionReading):
        return {}
    decoder: Any = model.base_model
    with capture_attention(model, asked.layers, reduce=asked.readings) as capture:
        decoder(token_ids[None], use_cache=False)
    read = joined_readings(capture.calls)
    aligned = {n: asked.aligned(v, response_length=response_length) for n, v in read.items()}
    return {name: values[0].float().cpu() for name, values in aligned.items()}


def weighted_records(
    records: Sequence[TokenRecord],
    made: Recipe,
    *,
    step: int,
    advantage: float | None = None,
    readings: Mapping[int | str, Tensor] | None = None,
) -> list[TokenRecord]:
    """Inspected records with the weights that a recipe gives this response, alone in its batch.

    Args:
        records: The records of `inspected_records`, one for each layer that the recipe reads.
        made: The recipe, with its layers numbered.
        step: Training step, for the schedule.
        advantage: Advantage of the response; None if the recipe reads none.
        readings: What `response_readings` gave; None if the recipe reads entropies only.

    Returns:
        The records with weights, and each layer's with what else was read of it.

    Raises:
        TokenWeightsError: If the recipe reads what a single response does not have.
    """
    first = records[0]
    given = RESPONSE_COLUMNS if advantage is None else (*RESPONSE_COLUMNS, "advantages")
    require_columns(made, given, caller="inspect")
    rows: dict[str, Any] = {
        name: torch.tensor([getattr(first, name)])
        for name in ("log_probs", "predictive_entropy")
        if name in made.columns
    }
    if "advantages" in made.columns:
        rows["advantages"] = torch.tensor([[advantage]])
    attention: dict[int | str, Tensor] = {
        int(record.layer): torch.tensor([record.attention_entropy])
        for record in records
        if isinstance(record.layer, int)
    }
    attention |= {name: values[None] for name, values in (readings or {}).items()}
    batch = RolloutBatch(
        mask=torch.ones(1, len(first.tokens), dtype=torch.bool),
        sample_ids=torch.zeros(1, dtype=torch.int64),
        prompt_ids=torch.zeros(1, dtype=torch.int64),
        token_ids=torch.tensor([first.token_ids]),
        attention=attention if made.attention is not None else None,
        **rows,
    )
    weights = tuple(made.weighted(batch, step=step).weights[0].tolist())
    return [
        replace(
            record,
            weights=weights,
            advantages=None if advantage is None else (advantage,) * len(weights),
            columns={**(record.columns or {}), **_of_layer(record, readings or {})},
        )
        for record in records
    ]


def _of_layer(
    record: TokenRecord, readings: Mapping[int | str, Tensor]
) -> dict[str, tuple[float, ...]]:
    """What was read of a record's layer, by names without the layer."""
    start = f"{record.layer}_"
    return {
        name.removeprefix(start): tuple(values.tolist())
        for name, values in readings.items()
        if isinstance(name, str) and name.startswith(start)
    }


def _add_rows(
    layer: _Layer,
    captured: CapturedAttention,
    rows: int,
    end: int,
    *,
    largest: int,
    local_window: int,
) -> None:
    """Adds the last `rows` queries of a call whose last key is at position `end - 1`."""
    options = {
        "scale": captured.scale,
        "window": captured.window,
        "softcap": captured.softcap,
        "sinks": captured.sinks,
    }
    query, key = captured.query[:, :, -rows:], captured.key
    statistics = attention_statistics(
        query,
        key,
        kinds=_KINDS,
        support_mass=SUPPORT_MASS,
        local_window=local_window,
        **options,
    )
    columns = {f"{kind}_entropy": getattr(statistics, kind)[0] for kind in ENTROPY_KINDS}
    sizes = statistics.support_size
    assert sizes is not None
    for place, mass in enumerate(SUPPORT_MASS):
        columns[f"support_size_{mass:g}"] = sizes[0, :, place].float()
    columns |= {name: getattr(statistics, name)[0] for name in _SPANS}
    columns[f"local_mass_{local_window}"] = columns.pop("local_mass")
    for name, values in columns.items():
        layer.columns.setdefault(name, []).append(values.float().cpu())
    offset = end - key.shape[2]  # a sliding cache has dropped so many keys
    for start in range(0, rows, _WEIGHT_ROWS):
        stop = min(start + _WEIGHT_ROWS, rows)
        keys = key.shape[2] - rows + stop
        weights = attention_weights(query[:, :, start:stop], key[:, :, :keys], **options)[0]
        top = weights.topk(min(largest, keys), -1)
        for shares, places in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            pairs = sorted((p, s) for p, s in zip(places, shares, strict=True) if s > 0)
            layer.places.append(tuple(place + offset for place, _ in pairs))
            layer.weights.append(tuple(float(f"{share:.5g}") for _, share in pairs))
