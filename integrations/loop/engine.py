"""What a loop of your own needs of a transformers model: responses, and what a recipe reads.

Responses are sampled over a growing cache; one pass over whole sequences then gives the columns of
a `RolloutBatch`. Both are plain functions of tensors: copy this file and change it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tokenweights import Recipe, capture_attention, predictive_entropy, self_certainty
from tokenweights.recipes.backward import joined_readings


@dataclass(frozen=True)
class Responses:
    """Prompts, padded on the left, and sampled responses, padded on the right.

    Attributes:
        ids: Tokens of prompt and response, `batch position`.
        real: True at tokens that are no padding, `batch position`.
        width: Columns of the prompts; the responses fill the others.
        texts: The responses as text.
    """

    ids: Tensor
    real: Tensor
    width: int
    texts: list[str]

    @property
    def tokens(self) -> Tensor:
        """Tokens of the responses, `batch token`."""
        return self.ids[:, self.width :]

    @property
    def mask(self) -> Tensor:
        """True for tokens of a response, its end included, `batch token`."""
        return self.real[:, self.width :]


@torch.no_grad()
def sampled(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, longest: int, temperature: float = 1.0
) -> Responses:
    """One sampled response to each prompt, token by token over the model's cache.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, which pads on the left.
        prompts: Texts; for several responses to a prompt, name it several times.
        longest: Most tokens of a response.
        temperature: Of the softmax that is sampled from, > 0.

    Returns:
        The responses. The draws are those of torch's global random state.
    """
    start = tokenizer([*prompts], padding=True, return_tensors="pt").to(model.device)
    ids, real = start["input_ids"], start["attention_mask"].bool()
    cache = DynamicCache(config=model.config)
    end, width = tokenizer.eos_token_id, ids.shape[1]
    fed, running = ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    for _ in range(longest):
        # The cache goes by place: its name differs between versions of transformers.
        output = model(fed, real.long(), places, cache, use_cache=True, logits_to_keep=1)
        shares = (output.logits[:, -1] / temperature).softmax(-1)
        fed = torch.where(running[:, None], shares.multinomial(1), tokenizer.pad_token_id)
        ids, real = torch.cat([ids, fed], 1), torch.cat([real, running[:, None]], 1)
        places, running = places[:, -1:] + 1, running & (fed[:, 0] != end)
        if not running.any():
            break
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return Responses(ids, real, width, texts)


def log_probs_of(
    model: Any, responses: Responses, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, `batch token`, and the logits it was drawn from."""
    places = (responses.real.long().cumsum(-1) - 1).clamp(min=0)
    output = model(
        responses.ids, attention_mask=responses.real.long(), position_ids=places, use_cache=False
    )
    logits = output.logits[:, responses.width - 1 : -1] / temperature
    chosen = logits.log_softmax(-1).gather(-1, responses.tokens[..., None])
    return chosen.squeeze(-1), logits


@torch.no_grad()
def columns(
    model: Any, responses: Responses, recipe: Recipe, *, temperature: float = 1.0
) -> dict[str, Any]:
    """What a recipe may read of the model that sampled: columns of a `RolloutBatch`.

    Args:
        model: The model, before any update.
        responses: The responses.
        recipe: The recipe, with its layers numbered: `recipe.on_model(model)`.
        temperature: That of the sampling.

    Returns:
        `log_probs`, which are the sampler's too, `predictive_entropy`, `self_certainty`, and
        `attention` if it is read.
    """
    signal, count = recipe.attention, responses.tokens.shape[1]

    def read(captured: Any) -> dict[int | str, Tensor]:
        assert signal is not None
        return signal.readings(captured, key_mask=responses.real)

    # The row that decides the first response token is the last one of the prompt.
    with capture_attention(model, recipe.layers, rows=count + 1, reduce=read) as capture:
        log_probs, logits = log_probs_of(model, responses, temperature=temperature)
    found = {
        "log_probs": log_probs,
        "sampler_log_probs": log_probs,  # nothing else has sampled
        "predictive_entropy": predictive_entropy(logits),
        "self_certainty": self_certainty(logits),
    }
    if signal is not None:
        found["attention"] = {
            name: signal.aligned(values, response_length=count)
            for name, values in joined_readings(capture.calls).items()
        }
    return found
