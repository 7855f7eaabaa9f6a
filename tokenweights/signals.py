"""Signals: one number for each response token, and the row of the sequence it is read from.

Attention entropy, the main signal, has a room of its own in `tokenweights.attention`; signals read
from log-probabilities have one in `tokenweights.likelihood`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.masked import sum_dtype

CPU_CHUNK_LOGITS = 2**18  # what its cache holds
GPU_CHUNK_LOGITS = 2**21  # what keeps it busy


@typed
def predictive_entropy(
    logits: Float[Tensor, "batch token vocab"], *, chunk_tokens: int = 2048
) -> Float[Tensor, "batch token"]:
    r"""Entropy of the next-token distribution, `batch token`, in nats (Eq. 19).

    $H = -\sum_v p_v \log p_v$ with $p = \mathrm{softmax}(\mathrm{logits})$, in [0, log vocab].
    With $s = \mathrm{logits} - \max \mathrm{logits}$ it is $\log Z - \sum_v e^{s_v} s_v / Z$ for
    $Z = \sum_v e^{s_v}$: one exponential for each logit, and no difference of large numbers.
    Computed in float32 and detached. Extra memory: a few MiB on a CPU, at most 32 MiB on a GPU,
    whatever the vocabulary; no copy is made of logits that are a view. Under `torch.compile` the
    rows are left to the compiler, whose fused kernels need no chunks.

    Args:
        logits: Of any float dtype, already divided by the sampling temperature. Row t must be the
            one that *predicts* token t. `-inf` marks a forbidden token.
        chunk_tokens: The most rows worked on at a time; large vocabularies take fewer.

    Returns:
        Float32 entropies; NaN for a row with NaN, with `inf`, or with `-inf` only.

    Raises:
        TokenWeightsError: If `chunk_tokens` < 1 or the vocabulary is empty.

    Example:
        >>> predictive_entropy(torch.zeros(1, 1, 8))
        tensor([[2.0794]])
    """
    return _by_blocks("predictive_entropy", _softmax_entropy, logits, chunk_tokens)


@typed
def self_certainty(
    logits: Float[Tensor, "batch token vocab"], *, chunk_tokens: int = 2048
) -> Float[Tensor, "batch token"]:
    r"""Divergence of the next-token distribution from the uniform one, `batch token`, in nats.

    $\mathrm{KL}(u \| p) = -\log V - \frac{1}{V} \sum_v \log p_v \ge 0$ with
    $p = \mathrm{softmax}(\mathrm{logits})$, 0 for equal logits (UCAS, arXiv 2510.10649). $V$ counts
    and $v$ runs over the allowed tokens only: one of probability 0 would make it infinite, and
    what top-k or a grammar forbids says nothing about how sure the model is. Float32, detached, and
    in the memory of `predictive_entropy`.

    Args:
        logits: As in `predictive_entropy`; `-inf` marks a forbidden token.
        chunk_tokens: The most rows worked on at a time; large vocabularies take fewer.

    Returns:
        Float32 divergences, finite; NaN for a row with NaN, with `inf`, or with `-inf` only.

    Raises:
        TokenWeightsError: If `chunk_tokens` < 1 or the vocabulary is empty.

    Example:
        >>> self_certainty(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]))
        tensor([[0.0000, 1.3250]])
    """
    return _by_blocks("self_certainty", _uniform_divergence, logits, chunk_tokens)


def _by_blocks(
    function: str, signal: Callable[[Tensor], Tensor], logits: Tensor, chunk_tokens: int
) -> Tensor:
    """A signal of each row of logits, with temporaries of a few rows."""
    if chunk_tokens < 1:
        raise invalid(function, "chunk_tokens", ">= 1", chunk_tokens, "Pass 2048.")
    batch, token, vocab = logits.shape
    if vocab == 0:
        shape, hint = f"shape {tuple(logits.shape)}", "The last axis is the vocabulary."
        raise invalid(function, "logits", "of at least one token type", shape, hint)
    logits = logits.detach()
    if torch.compiler.is_compiling():
        return signal(logits)
    found = torch.empty(batch, token, dtype=torch.float32, device=logits.device)
    room = CPU_CHUNK_LOGITS if logits.device.type == "cpu" else GPU_CHUNK_LOGITS
    rows = min(chunk_tokens, max(room // vocab, 1))
    # Blocks of both axes, so that every block is a view and short responses share one.
    tokens, responses = min(rows, max(token, 1)), max(rows // max(token, 1), 1)
    for first in range(0, batch, responses):
        for start in range(0, token, tokens):
            block = slice(first, first + responses), slice(start, start + tokens)
            found[block] = signal(logits[block])
    return found


def _softmax_entropy(logits: Tensor) -> Tensor:
    highest = logits.amax(-1, keepdim=True).to(sum_dtype(logits.dtype))
    # Far below, exp is 0 in float32 and stays so; there 0 * -inf would be NaN.
    below = (logits - highest).float().clamp_(min=-200.0)
    mass = below.exp()
    total = mass.sum(-1)
    return (total.log() - mass.mul_(below).sum(-1) / total).clamp_(min=0)


def _uniform_divergence(logits: Tensor) -> Tensor:
    allowed = logits > -torch.inf
    highest = logits.amax(-1, keepdim=True).to(sum_dtype(logits.dtype))
    below = (logits - highest).float()
    total = below.exp().sum(-1)
    count = allowed.sum(-1)
    mean = below.masked_fill_(~allowed, 0.0).sum(-1) / count
    # NaN among the logits is not allowed either, but it is in the total.
    largest = torch.finfo(torch.float32).max
    return ((total / count).log() - mean).clamp_(min=0, max=largest)


@typed
def loss_magnitude(token_loss: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    r"""Magnitude of each token's loss, $|\ell_t|$, float32 and detached (Eq. 23).

    Args:
        token_loss: Unreduced loss of each response token.

    Returns:
        Values >= 0.

    Example:
        >>> loss_magnitude(torch.tensor([[-0.5, 0.25]]))
        tensor([[0.5000, 0.2500]])
    """
    return token_loss.detach().float().abs()


@typed
def relative_position(mask: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Position of each token within its response, $t / T$ with $t$ from 1, in (0, 1] (Eq. 18).

    Args:
        mask: True for valid response tokens.

    Returns:
        Float32 positions, 0 off the mask.

    Example:
        >>> relative_position(torch.tensor([[True, True, False]]))
        tensor([[0.5000, 1.0000, 0.0000]])
    """
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, mask.cumsum(-1).float() / lengths, 0.0)


@typed
def align_to_decision(
    scores: Float[Tensor, "batch position"],
    *,
    response_length: int,
    prompt_length: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Scores of the rows that *generate* each response token, one to the left of its own row.

    The first response token is decided at the prompt's last position, the next at the first
    response token, and so on (Appendix K). The result has `response_length` columns.

    Args:
        scores: One score for each position of the sequence, or for the last
            `response_length + 1` or more of them.
        response_length: Width of the response part.
        prompt_length: None where prompts are left-padded, so that every response starts in the
            same column and fills the last `response_length`. Otherwise the number of prompt
            tokens in each row of right-padded sequences, counted from the first column of
            `scores`.

    Returns:
        The score at the deciding position of each response token, differentiable in `scores`; 0
        beyond the last column.

    Raises:
        TokenWeightsError: If there is no position before the first response token.

    Example:
        >>> scores = torch.tensor([[10.0, 11.0, 12.0, 13.0]])  # two prompt, two response tokens
        >>> align_to_decision(scores, response_length=2)
        tensor([[11., 12.]])
    """
    return _aligned("align_to_decision", scores, response_length, prompt_length, shift=1)


@typed
def align_to_own(
    scores: Float[Tensor, "batch position"],
    *,
    response_length: int,
    prompt_length: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Scores of each response token's own row: the query of the token itself.

    Args:
        scores: As in `align_to_decision`.
        response_length: As in `align_to_decision`.
        prompt_length: As in `align_to_decision`.

    Returns:
        The score at each response token's own position, differentiable in `scores`; 0 beyond the
        last column.

    Raises:
        TokenWeightsError: If `scores` has fewer columns than the response.

    Example:
        >>> scores = torch.tensor([[10.0, 11.0, 12.0, 13.0]])  # two prompt, two response tokens
        >>> align_to_own(scores, response_length=2)
        tensor([[12., 13.]])
    """
    return _aligned("align_to_own", scores, response_length, prompt_length, shift=0)


def _aligned(
    function: str, scores: Tensor, response_length: int, prompt_length: Tensor | None, shift: int
) -> Tensor:
    width = scores.shape[-1]
    if response_length < 0:
        raise invalid(
            function, "response_length", ">= 0", response_length, "Pass the response's width."
        )
    if prompt_length is None:
        if width < response_length + shift:
            raise invalid(
                function,
                "scores",
                f"with at least {response_length + shift} columns",
                f"shape {tuple(scores.shape)}",
                "Score the response positions and the prompt's last position.",
            )
        start = width - response_length - shift
        return scores[:, start : start + response_length]
    if bool((prompt_length < shift).any()) or bool((prompt_length > width).any()):
        raise invalid(
            function,
            "prompt_length",
            f"in [{shift}, {width}]",
            prompt_length.tolist(),
            "A response needs a position that decides its first token.",
        )
    columns = torch.arange(response_length, device=scores.device) + prompt_length[:, None] - shift
    if width == 0:
        return scores.new_zeros(columns.shape)
    inside = columns < width
    return torch.where(inside, scores.gather(-1, columns.clamp(max=width - 1)), 0.0)
