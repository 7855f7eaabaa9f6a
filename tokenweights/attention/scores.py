"""How large the scores of a layer can be, and which precision resolves them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.masked import accumulator_dtype

# An error in a score is an error in its weight: float32 products of this size move a statistic by
# up to 1e-5 on a CPU and, where double precision may be slow, by up to 1e-4 on an accelerator.
CPU_FLOAT32_SCORE, ACCELERATOR_FLOAT32_SCORE = 64.0, 1024.0
# Products of this size are rounded by 1e-6 in float64, and nothing wider is at hand.
LARGEST_SCORE = 2.0**33
# Within these factors neither a float32 product nor its square overflows or loses digits below.
ORDINARY_LENGTH, ORDINARY_SCALE = (1e-15, 1e15), (2.0**-20, 2.0**20)


@dataclass(frozen=True)
class ScoreRange:
    """Bounds of the scores of some queries and keys.

    Attributes:
        largest: Per query head, what no scaled inner product exceeds in size (Cauchy-Schwarz).
        ordinary: Whether float32 holds the factors, so that only the size of the scores matters.
    """

    largest: tuple[float, ...]
    ordinary: bool

    def in_float32(self, limit: float) -> tuple[bool, ...]:
        """Per head, whether float32 resolves its scores, which is doubted above `limit`."""
        return tuple(self.ordinary and size <= limit for size in self.largest)


def score_range(
    query: Float[Tensor, "*batch heads query dim"],
    key: Float[Tensor, "*batch kv_heads key dim"],
    scale: float,
) -> ScoreRange:
    """The range of all scores, padding included; no bound is a number where some input is not."""
    wide = accumulator_dtype(query.device)
    lengths = [_longest(query, torch.float32), _longest(key, torch.float32)]
    ordinary = _all_between(lengths, *ORDINARY_LENGTH)
    if not ordinary:
        # Zeros, or squares that float32 does not hold.
        lengths = [_longest(query, wide), _longest(key, wide)]
        ordinary = _all_between([length[length != 0] for length in lengths], *ORDINARY_LENGTH)
    least_scale, most_scale = ORDINARY_SCALE
    ordinary = ordinary and least_scale <= abs(scale) <= most_scale
    largest_query, largest_key = (length.to(wide) for length in lengths)
    group = query.shape[-3] // key.shape[-3]
    largest = largest_query * largest_key.repeat_interleave(group) * abs(scale)
    return ScoreRange(tuple(largest.tolist()), ordinary)


def float32_limit(device: torch.device) -> float:
    """Up to which size float32 resolves scores on a device."""
    return CPU_FLOAT32_SCORE if device.type == "cpu" else ACCELERATOR_FLOAT32_SCORE


def check_scores(function: str, scores: ScoreRange) -> None:
    """Refuse scores that float64 cannot tell apart."""
    largest = max(scores.largest, key=lambda size: size if size == size else torch.inf)
    # Written so that a NaN fails too.
    if not largest <= LARGEST_SCORE:
        condition = f"and `key` to have scaled inner products of at most {LARGEST_SCORE:.2g}"
        hint = "Float64 does not resolve larger ones: rescale the inputs, or check `scale`."
        raise invalid(function, "query", condition, f"a bound of {largest:.2g}", hint)


def _longest(
    vectors: Float[Tensor, "*batch heads token dim"], dtype: torch.dtype
) -> Float[Tensor, " heads"]:
    dtype = torch.promote_types(dtype, vectors.dtype)
    length = torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype).amax(-1)
    return length.reshape(-1, length.shape[-1]).amax(0)


def _all_between(lengths: list[Float[Tensor, " heads"]], least: float, most: float) -> bool:
    length = torch.cat(lengths)
    return bool(((length > least) & (length < most)).all())
