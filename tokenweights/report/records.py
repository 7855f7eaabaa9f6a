"""Records of a run: one JSON object per line, appended while training runs.

Two kinds of file, both plain JSON Lines that any tool can read. A *token file* holds one
`TokenRecord` per line: a response with everything that decided its token weights. A *metrics file*
holds one flat object of numbers per training step, under the key `step`.

The files are strict JSON: `NaN` and `Infinity` are never written and never accepted. A token record
refuses a number that is not finite. A metric that is not finite is written as `null` and read back
as NaN, because a run may well log one and should still leave a trace of its other numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import TokenWeightsError, invalid, refused_by
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind
from tokenweights.masked import require_finite
from tokenweights.partition import bottom_fraction, top_fraction
from tokenweights.recipes.attention import Alignment
from tokenweights.report.lines import (
    REPAIR,
    FilePath,
    Unreadable,
    append_lines,
    read_lines,
)

TokenGroup = Literal["anchor", "middle", "explorer"]


@dataclass(frozen=True)
class TokenRecord:
    """One response, with one value per token for everything that decided its token weights.

    All per-token fields are tuples as long as `tokens`; lists, tensors and NumPy arrays are taken
    and become tuples of Python's numbers. Entropies and log-probabilities are in nats; a normalized
    attention entropy has no unit. Everything after `alignment` is optional and None where it was
    not recorded.

    Attributes:
        step: Training step of the rollout.
        sample_id: Number of the response within its run.
        prompt: The prompt as text.
        tokens: Text of each response token.
        token_ids: Vocabulary index of each token.
        attention_entropy: Attention entropy of each token.
        layer: The layer that was read, or the layers that were averaged.
        entropy_kind: Variant of the attention entropy.
        alignment: The attention row that stands for a token: `deciding` is the position that
            generates it (one to the left), `own` the position of the token itself.
        weights: Token weights, at least 0.
        advantages: Advantages before weighting.
        predictive_entropy: Entropy of the next-token distribution that each token was drawn from.
        log_probs: Log-probability of each token.
        group: Label of each token, `anchor`, `middle` or `explorer`.
        reward: Reward of the response.
        columns: Further numbers of each token by name, such as `support_size_0.9`.
        prompt_tokens: Text of each prompt token.
        attended: For each token the places of its largest attention weights, in the context that
            `prompt_tokens` and `tokens` make up, counted from 0.
        attended_weights: The weights at these places, shares of the visible mass.

    Example:
        >>> record = TokenRecord(
        ...     step=0,
        ...     sample_id=7,
        ...     prompt="1+1=",
        ...     tokens=("2", "."),
        ...     token_ids=(5, 9),
        ...     attention_entropy=(0.8, 0.3),
        ...     layer=2,
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ...     weights=(1.0, 0.5),
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
    layer: int | tuple[int, ...]
    entropy_kind: EntropyKind
    alignment: Alignment
    weights: tuple[float, ...] | None = None
    advantages: tuple[float, ...] | None = None
    predictive_entropy: tuple[float, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    group: tuple[TokenGroup, ...] | None = None
    reward: float | None = None
    columns: Mapping[str, tuple[float, ...]] | None = None
    prompt_tokens: tuple[str, ...] | None = None
    attended: tuple[tuple[int, ...], ...] | None = None
    attended_weights: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _plain(getattr(self, each.name)))
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        _check("step", (self.step,), "a whole number", _is_whole)
        _check("sample_id", (self.sample_id,), "a whole number", _is_whole)
        _check("layer", layers, "whole numbers", _is_whole)
        _check("prompt", (self.prompt,), "text", _is_text)
        _check("entropy_kind", (self.entropy_kind,), _one_of(EntropyKind), _in(EntropyKind))
        _check("alignment", (self.alignment,), _one_of(Alignment), _in(Alignment))
        if self.reward is not None:
            _check("reward", (self.reward,), "a finite number", _is_finite)
        _check_text("tokens", self.tokens)
        for name, condition, valid in _PER_TOKEN:
            values = getattr(self, name)
            if values is not None or name not in _OPTIONAL:
                _check_column(name, values, len(self.tokens), condition, valid)
        if not isinstance(self.columns, Mapping | None):
            got, hint = type(self.columns), "Pass a dictionary of tuples."
            raise invalid("TokenRecord", "columns", "to be a mapping", got, hint)
        for name, values in (self.columns or {}).items():
            _check_column(f"columns[{name!r}]", values, len(self.tokens), "finite", _is_finite)
        if self.prompt_tokens is not None:
            _check_text("prompt_tokens", self.prompt_tokens)
        if self.attended is not None or self.attended_weights is not None:
            _check_attention(self)


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
    weights: Float[Tensor, "batch token"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
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
        layer: As in `TokenRecord`; a tuple of one layer stands for that layer.
        entropy_kind: As in `TokenRecord`.
        alignment: As in `TokenRecord`.
        predictive_entropy: Predictive entropy of each token, in nats.
        log_probs: Log-probability of each token.

    Returns:
        One record for each response.

    Raises:
        TokenWeightsError: If there are not as many prompts and sample ids as responses, or a valid
            number is none that `TokenRecord` takes.

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
        ...     layer=(2,),
        ...     entropy_kind="normalized",
        ...     alignment="deciding",
        ... )
        >>> record.tokens, record.group, record.layer
        (('2', '.'), ('explorer', 'anchor'), 2)
    """
    if not len(prompts) == len(sample_ids) == len(mask):
        raise invalid(
            "token_records", "prompts", f"for each of the {len(mask)} responses", len(prompts),
            "Pass one prompt text for each row.",
        )  # fmt: skip
    require_finite("token_records", "attention_entropy", attention_entropy, mask)
    anchors = bottom_fraction(attention_entropy, mask)
    labels = anchors.long() + 2 * (top_fraction(attention_entropy, mask) & ~anchors)
    names = ("middle", "anchor", "explorer")

    def values(rows: Tensor | None, row: int) -> tuple[float, ...] | None:
        return None if rows is None else tuple(rows.expand(mask.shape)[row][mask[row]].tolist())

    records = []
    for row, prompt in enumerate(prompts):
        ids = token_ids[row][mask[row]].tolist()
        with refused_by("token_records"):
            record = TokenRecord(
                step=step,
                sample_id=int(sample_ids[row]),
                prompt=prompt,
                tokens=tuple(decode([token]) for token in ids),
                token_ids=tuple(ids),
                attention_entropy=tuple(attention_entropy[row][mask[row]].tolist()),
                weights=values(weights, row),
                advantages=values(advantages, row),
                layer=layer[0] if isinstance(layer, tuple) and len(layer) == 1 else layer,
                entropy_kind=entropy_kind,
                alignment=alignment,
                predictive_entropy=values(predictive_entropy, row),
                log_probs=values(log_probs, row),
                group=tuple(names[label] for label in labels[row][mask[row]].tolist()),
            )
        records.append(record)
    return records


@typed
def append_token_records(path: FilePath, records: Iterable[TokenRecord]) -> None:
    """Appends records to a token file, one JSON line each, as they come.

    Args:
        path: The file; it and its folder are made when they are missing.
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
    append_lines(path, map(vars, records))  # as deep a copy as `asdict` makes would cost more


@typed
def read_token_records(
    path: FilePath, *, unreadable: Unreadable | None = None
) -> Iterator[TokenRecord]:
    """The records of a token file in file order, one at a time.

    A run that went on from a checkpoint may have recorded a response twice: both are yielded.
    `run_from_directory` and `entropy_metrics` take the last.

    Args:
        path: A file written by `append_token_records`.
        unreadable: Called with a message that names file and line for each line that cannot be
            read, which is then left out. None raises instead.

    Returns:
        An iterator that holds one record in memory.

    Raises:
        TokenWeightsError: A line is cut off or is no token record, and `unreadable` is None.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "tokens.jsonl"
        ...     _ = path.write_text('{"step": 1, "tok')
        ...     messages = []
        ...     found = list(read_token_records(path, unreadable=messages.append))
        >>> found, "tokens.jsonl:1" in messages[0]
        ([], True)
    """
    names = {field.name for field in fields(TokenRecord)}

    def parsed(place: str, line: dict[str, Any]) -> TokenRecord:
        unknown, missing = line.keys() - names, names - line.keys() - _OPTIONAL
        if unknown or missing:
            got = f"{place}: unknown {sorted(unknown)}, missing {sorted(missing)}"
            raise invalid("read_token_records", "path", "to hold token records", got, REPAIR)
        try:
            return TokenRecord(**line)
        except TokenWeightsError as error:
            condition, got = "to hold token records", f"{place}: {error}"
            raise invalid("read_token_records", "path", condition, got, REPAIR) from error

    yield from read_lines("read_token_records", path, parsed, unreadable)


@typed
def append_metrics(path: FilePath, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of one training step to a metrics file, as one JSON line.

    Args:
        path: The file; it and its folder are made when they are missing.
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
    append_lines(path, [{name: v if math.isfinite(v) else None for name, v in metrics.items()}])


@typed
def append_log(path: FilePath | None, log: Mapping[str, Any], *, step: int) -> None:
    """Appends what is a number in a trainer's log of one step, as `append_metrics` does.

    Args:
        path: The file; it and its folder are made when they are missing. None writes nothing.
        log: Numbers, also those of NumPy, and anything else, which is left out.
        step: Training step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_log(f"{folder}/metrics.jsonl", {"reward": 0.5, "text": "1+1="}, step=3)
        ...     read_metrics(f"{folder}/metrics.jsonl")
        [{'reward': 0.5, 'step': 3}]
    """
    numbers = {
        name: float(value)
        for name, value in log.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }
    if path is not None:
        append_metrics(path, {**numbers, "step": step})


@typed
def read_metrics(path: FilePath, *, unreadable: Unreadable | None = None) -> list[dict[str, float]]:
    """The lines of a metrics file in file order; a `null` becomes NaN.

    Args:
        path: A file written by `append_metrics`, or by VeRL's file logger, which puts everything
            but the step into `data`; of that, numbers are taken.
        unreadable: As in `read_token_records`.

    Returns:
        One flat dictionary per line.

    Raises:
        TokenWeightsError: A line is cut off or is no flat object of numbers with a `step`, and
            `unreadable` is None. The message names file and line.
    """

    def parsed(place: str, line: dict[str, Any]) -> dict[str, float]:
        if line.keys() == {"step", "data"} and isinstance(line["data"], dict):
            numbers = {name: v for name, v in line["data"].items() if _is_number(v)}
            finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
            line = {**finite, "step": line["step"]}
        wrong = [
            name for name, value in line.items() if value is not None and not _is_finite(value)
        ]
        if wrong or not _is_finite(line.get("step")):
            got = f"{place}: no finite number in {wrong or ['step']}"
            raise invalid("read_metrics", "path", "to hold flat metrics", got, REPAIR)
        return {name: math.nan if value is None else value for name, value in line.items()}

    return list(read_lines("read_metrics", path, parsed, unreadable))


def _plain(value: Any) -> Any:
    """The value in Python's own numbers, with a tuple for each list, tensor and array."""
    if value is None or isinstance(value, float | int | str):
        # A float of NumPy's is one of Python's too; JSON and `repr` need the latter.
        return float(value) if isinstance(value, float) else value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


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


def _check_text(name: str, values: Any) -> None:
    if not isinstance(values, tuple):
        raise invalid("TokenRecord", name, "to be a tuple", type(values), "Pass a tuple of texts.")
    _check(name, values, "text", _is_text)


def _check_column(name: str, values: Any, tokens: int, condition: str, valid: Any) -> None:
    hint = "Pass a tuple with one value per token."
    if not isinstance(values, tuple):
        raise invalid("TokenRecord", name, "to be a tuple", type(values), hint)
    if len(values) != tokens:
        expected = f"as long as `tokens` ({tokens})"
        raise invalid("TokenRecord", name, expected, f"{len(values)} values", hint)
    _check(name, values, condition, valid)


def _check_attention(record: TokenRecord) -> None:
    if record.prompt_tokens is None:
        hint = "Places of the context need the tokens of the prompt."
        raise invalid(
            "TokenRecord", "prompt_tokens", "with `attended` and `attended_weights`", "none", hint
        )
    size = len(record.prompt_tokens) + len(record.tokens)

    def is_place(value: Any) -> bool:
        return _is_whole(value) and 0 <= value < size

    pairs = []
    for name, valid in (("attended", is_place), ("attended_weights", _is_weight)):
        rows = getattr(record, name)
        condition = "tuples of places in the context, and of a weight at least 0 for each"
        _check_column(name, rows, len(record.tokens), condition, lambda row: isinstance(row, tuple))
        for row in rows:
            _check(name, row, condition, valid)
        pairs.append([len(row) for row in rows])
    if pairs[0] != pairs[1]:
        got, hint = "rows of other lengths", "Pass one weight for each place."
        raise invalid("TokenRecord", "attended_weights", "as long as `attended`", got, hint)


_OPTIONAL = {field.name for field in fields(TokenRecord) if field.default is None}
_PER_TOKEN = (
    ("token_ids", "whole numbers", _is_whole),
    ("attention_entropy", "finite", _is_finite),
    ("weights", "finite and at least 0", _is_weight),
    ("advantages", "finite", _is_finite),
    ("predictive_entropy", "finite", _is_finite),
    ("log_probs", "finite", _is_finite),
    ("group", _one_of(TokenGroup), _in(TokenGroup)),
)
