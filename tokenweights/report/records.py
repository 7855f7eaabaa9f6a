"""Records of a run: one JSON object per line, appended while training runs.

Two kinds of file, both plain JSON Lines that any tool can read. A *token file* holds one
`TokenRecord` per line: a response with everything that decided its token weights. A *metrics file*
holds one flat object of numbers per training step, under the key `step`.

The files are strict JSON: `NaN` and `Infinity` are never written and never accepted. A token record
refuses a number that is not finite. A metric that is not finite is written as `null` and read back
as NaN, because a run may well log one and should still leave a trace of its other numbers.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind
from tokenweights.partition import bottom_fraction, top_fraction
from tokenweights.recipes.record import Alignment

TokenGroup = Literal["anchor", "middle", "explorer"]
FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class TokenRecord:
    """One response, with one value per token for everything that decided its token weights.

    All per-token fields are tuples as long as `tokens`. Entropies and log-probabilities are in
    nats; a normalized attention entropy has no unit.

    Attributes:
        step: Training step of the rollout.
        sample_id: Number of the response within its run.
        prompt: The prompt as text.
        tokens: Text of each response token.
        token_ids: Vocabulary index of each token.
        attention_entropy: Attention entropy of each token.
        weights: Token weights, at least 0.
        advantages: Advantages before weighting.
        layer: The layer that was read, or the layers that were averaged.
        entropy_kind: Variant of the attention entropy.
        alignment: The attention row that stands for a token: `deciding` is the position that
            generates it (one to the left), `own` the position of the token itself.
        predictive_entropy: Entropy of the next-token distribution that each token was drawn from.
        log_probs: Log-probability of each token.
        group: Label of each token, `anchor`, `middle` or `explorer`.
        reward: Reward of the response.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=7,
        ...     prompt="1+1=",
        ...     tokens=("2", "."),
        ...     token_ids=(5, 9),
        ...     attention_entropy=(0.8, 0.3),
        ...     weights=(1.0, 0.5),
        ...     advantages=(0.7, 0.7),
        ...     layer=2,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ... )
        >>> len(record.tokens)
        2
    """

    step: int
    sample_id: int
    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    attention_entropy: tuple[float, ...]
    weights: tuple[float, ...]
    advantages: tuple[float, ...]
    layer: int | tuple[int, ...]
    entropy_kind: EntropyKind
    alignment: Alignment
    predictive_entropy: tuple[float, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    group: tuple[TokenGroup, ...] | None = None
    reward: float | None = None

    def __post_init__(self) -> None:
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        _check("step", (self.step,), "a whole number", _is_whole)
        _check("sample_id", (self.sample_id,), "a whole number", _is_whole)
        _check("layer", layers, "whole numbers", _is_whole)
        _check("prompt", (self.prompt,), "text", _is_text)
        _check("entropy_kind", (self.entropy_kind,), _one_of(EntropyKind), _in(EntropyKind))
        _check("alignment", (self.alignment,), _one_of(Alignment), _in(Alignment))
        if self.reward is not None:
            _check("reward", (self.reward,), "a finite number", _is_finite)
        hint = "Pass a tuple with one value per token."
        for name, condition, valid in _PER_TOKEN:
            values = getattr(self, name)
            if values is None and name in _OPTIONAL:
                continue
            if not isinstance(values, tuple):
                raise invalid("TokenRecord", name, "to be a tuple", type(values), hint)
            if len(values) != len(self.tokens):
                expected = f"as long as `tokens` ({len(self.tokens)})"
                raise invalid("TokenRecord", name, expected, f"{len(values)} values", hint)
            _check(name, values, condition, valid)


@typed
def token_records(
    attention_entropy: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    step: int,
    sample_ids: Int[Tensor, " batch"],
    prompts: Sequence[str],
    token_ids: Int[Tensor, "batch token"],
    decode: Callable[[list[int]], str],
    weights: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch #token"],
    layer: int | tuple[int, ...],
    entropy_kind: EntropyKind,
    alignment: Alignment,
    predictive_entropy: Float[Tensor, "batch token"] | None = None,
    log_probs: Float[Tensor, "batch token"] | None = None,
) -> list[TokenRecord]:
    """Records of a batch of responses; the bottom and top 20 % by entropy are labeled.

    Args:
        attention_entropy: Attention entropy of each token, in nats or normalized.
        mask: True for valid response tokens; the others are left out.
        step: Training step of the rollout.
        sample_ids: A number for each response that no other response of the run has.
        prompts: Text of each prompt.
        token_ids: Vocabulary index of each token.
        decode: Turns a list of token ids into text.
        weights: Token weights.
        advantages: Advantages before weighting, one for each token or for each response.
        layer: As in `TokenRecord`.
        entropy_kind: As in `TokenRecord`.
        alignment: As in `TokenRecord`.
        predictive_entropy: Predictive entropy of each token, in nats.
        log_probs: Log-probability of each token.

    Returns:
        One record for each response.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2)
        >>> (record,) = token_records(
        ...     torch.tensor([[0.9, 0.1]]),
        ...     ones.bool(),
        ...     step=0,
        ...     sample_ids=torch.tensor([7]),
        ...     prompts=["1+1="],
        ...     token_ids=torch.tensor([[5, 9]]),
        ...     decode=lambda ids: {5: "2", 9: "."}[ids[0]],
        ...     weights=ones,
        ...     advantages=ones,
        ...     layer=2,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ... )
        >>> record.tokens, record.group
        (('2', '.'), ('explorer', 'anchor'))
    """
    if not len(prompts) == len(sample_ids) == len(mask):
        raise invalid(
            "token_records", "prompts", f"for each of the {len(mask)} responses", len(prompts),
            "Pass one prompt text for each row.",
        )  # fmt: skip
    anchors = bottom_fraction(attention_entropy, mask)
    labels = anchors.long() + 2 * (top_fraction(attention_entropy, mask) & ~anchors)
    names = ("middle", "anchor", "explorer")

    def values(rows: Tensor, row: int) -> tuple[float, ...]:
        return tuple(rows.expand(mask.shape)[row][mask[row]].tolist())

    records = []
    for row, prompt in enumerate(prompts):
        ids = token_ids[row][mask[row]].tolist()
        records.append(
            TokenRecord(
                step=step,
                sample_id=int(sample_ids[row]),
                prompt=prompt,
                tokens=tuple(decode([token]) for token in ids),
                token_ids=tuple(ids),
                attention_entropy=values(attention_entropy, row),
                weights=values(weights, row),
                advantages=values(advantages, row),
                layer=layer,
                entropy_kind=entropy_kind,
                alignment=alignment,
                predictive_entropy=None
                if predictive_entropy is None
                else values(predictive_entropy, row),
                log_probs=None if log_probs is None else values(log_probs, row),
                group=tuple(names[label] for label in labels[row][mask[row]].tolist()),
            )
        )
    return records


@typed
def append_token_records(path: FilePath, records: Iterable[TokenRecord]) -> None:
    """Appends records to a token file, one JSON line each, as they come.

    Args:
        path: The file; it is made when it is missing.
        records: Records, consumed one at a time.

    Example:
        >>> import tempfile
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=7,
        ...     prompt="1+1=",
        ...     tokens=("2",),
        ...     token_ids=(5,),
        ...     attention_entropy=(0.8,),
        ...     weights=(1.0,),
        ...     advantages=(0.7,),
        ...     layer=2,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_token_records(f"{folder}/tokens.jsonl", [record])
        ...     list(read_token_records(f"{folder}/tokens.jsonl")) == [record]
        True
    """
    _append_lines(path, (asdict(record) for record in records))


@typed
def read_token_records(path: FilePath) -> Iterator[TokenRecord]:
    """The records of a token file in file order, one at a time.

    Args:
        path: A file written by `append_token_records`.

    Returns:
        An iterator that holds one record in memory.

    Raises:
        TokenWeightsError: A line is cut off or is no token record. The message names file and line.
    """
    names = {field.name for field in fields(TokenRecord)}
    for place, line in _read_lines("read_token_records", path):
        unknown, missing = line.keys() - names, names - line.keys() - _OPTIONAL
        if unknown or missing:
            got = f"{place}: unknown {sorted(unknown)}, missing {sorted(missing)}"
            raise invalid("read_token_records", "path", "to hold token records", got, _REPAIR)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in line.items()
        }
        try:
            record = TokenRecord(**values)
        except TokenWeightsError as error:
            condition, got = "to hold token records", f"{place}: {error}"
            raise invalid("read_token_records", "path", condition, got, _REPAIR) from error
        yield record


@typed
def append_metrics(path: FilePath, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of one training step to a metrics file, as one JSON line.

    Args:
        path: The file; it is made when it is missing.
        metrics: Flat numbers with the key `step`. A value that is not finite is written as `null`.

    Raises:
        TokenWeightsError: `step` is missing or not finite, or a value is no number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_metrics(f"{folder}/metrics.jsonl", {"step": 3, "reward": 0.25})
        ...     read_metrics(f"{folder}/metrics.jsonl")
        [{'step': 3, 'reward': 0.25}]
    """
    for name, value in metrics.items():
        if not _is_number(value):
            raise invalid(
                "append_metrics", f"metrics[{name!r}]", "a number", repr(value), "Drop it."
            )
    if not _is_finite(metrics.get("step")):
        got = metrics.get("step")
        raise invalid("append_metrics", "metrics['step']", "a finite number", got, "Add the step.")
    _append_lines(path, [{name: v if math.isfinite(v) else None for name, v in metrics.items()}])


@typed
def read_metrics(path: FilePath) -> list[dict[str, float]]:
    """The lines of a metrics file in file order; a `null` becomes NaN.

    Args:
        path: A file written by `append_metrics`.

    Returns:
        One flat dictionary per line.

    Raises:
        TokenWeightsError: A line is cut off or is no flat object of numbers with a `step`. The
            message names file and line.
    """
    metrics = []
    for place, line in _read_lines("read_metrics", path):
        wrong = [
            name for name, value in line.items() if value is not None and not _is_finite(value)
        ]
        if wrong or not _is_finite(line.get("step")):
            got = f"{place}: no finite number in {wrong or ['step']}"
            raise invalid("read_metrics", "path", "to hold flat metrics", got, _REPAIR)
        metrics.append({name: math.nan if value is None else value for name, value in line.items()})
    return metrics


_REPAIR = "A run that was stopped while writing leaves such a line; delete the line."


def _append_lines(path: FilePath, objects: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            # A stopped run may have left half a line: keep the next record off it.
            if file.read(1) != b"\n":
                file.write(b"\n")
        for entry in objects:
            # ASCII escapes carry any token text, lone surrogates of split characters included.
            file.write(json.dumps(entry, allow_nan=False).encode("ascii") + b"\n")
            file.flush()


def _read_lines(function: str, path: FilePath) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{os.fspath(path)}:{number}"
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode("utf-8"))
            except ValueError as error:
                condition, got = "to hold one JSON object per line", f"{place}: {error}"
                raise invalid(function, "path", condition, got, _REPAIR) from error
            if not isinstance(entry, dict):
                condition, got = "to hold one JSON object per line", f"{place}: {type(entry)}"
                raise invalid(function, "path", condition, got, _REPAIR)
            yield place, entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_weight(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _in(literal: Any) -> Any:
    return get_args(literal).__contains__


def _one_of(literal: Any) -> str:
    return "one of " + ", ".join(get_args(literal))


def _check(name: str, values: tuple[Any, ...], condition: str, valid: Any) -> None:
    for position, value in enumerate(values):
        if not valid(value):
            got = repr(value) if len(values) == 1 else f"{value!r} at position {position}"
            raise invalid("TokenRecord", name, f"to be {condition}", got, "Correct the record.")


_OPTIONAL = {"predictive_entropy", "log_probs", "group", "reward"}
_PER_TOKEN = (
    ("tokens", "text", _is_text),
    ("token_ids", "whole numbers", _is_whole),
    ("attention_entropy", "finite", _is_finite),
    ("weights", "finite and at least 0", _is_weight),
    ("advantages", "finite", _is_finite),
    ("predictive_entropy", "finite", _is_finite),
    ("log_probs", "finite", _is_finite),
    ("group", _one_of(TokenGroup), _in(TokenGroup)),
)
