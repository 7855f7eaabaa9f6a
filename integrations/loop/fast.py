"""A small Qwen3 in plain torch, fast on one CPU core: for loops that run hundreds of times.

The policy keeps its weights fused, samples over a cache of keys and values, and reads what a recipe
asks for while it samples: log-probabilities, predictive entropies, attention entropies. An update
computes each prompt once for all its responses and leaves out prompts whose responses have all the
same reward, as their gradient is zero. Samples and gradients are those of the transformers model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenweights as tw

PAD, END = 0, 1
HIDDEN = -1e9  # what a score of a key that is not visible is lowered by


@dataclass(frozen=True)
class Sizes:
    """What a pass needs of the model's configuration.

    Attributes:
        heads: Query heads.
        shared: Heads of keys and values.
        width: Of a head.
        eps: Of the root mean squares.
        theta: Base of the rotations.
    """

    heads: int
    shared: int
    width: int
    eps: float
    theta: float


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, those of one input side by side, `out in`."""

    attention_norm: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Policy:
    """The weights of a Qwen3 with tied embeddings, as leaves that gradients are taken by."""

    sizes: Sizes
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """All weights, each once."""
        rows = [[getattr(layer, item.name) for item in fields(layer)] for layer in self.layers]
        return [self.embedding, *(weight for row in rows for weight in row), self.norm]


@dataclass(frozen=True)
class Rollout:
    """Responses to prompts, `samples` to each, rows of a prompt side by side.

    Attributes:
        prompts: Token ids, padded on the left, `prompt position`.
        real: True for tokens of a prompt, `prompt position`.
        tokens: Token ids of the responses, padded on the right, `batch token`.
        mask: True for tokens of a response, its end included, `batch token`.
        log_probs: Of the sampled tokens, before top-p, nats, `batch token`.
        predictive_entropy: Of the next-token distributions, nats, `batch token`; None if not read.
        attention: Normalized attention entropy of the row that decides each token, `batch token`,
            for each layer that was read.
    """

    prompts: Tensor
    real: Tensor
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    predictive_entropy: Tensor | None
    attention: dict[int, Tensor]

    @property
    def samples(self) -> int:
        """Responses to a prompt."""
        return len(self.tokens) // len(self.prompts)

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """Token ids of each response after its prompt, and where they are real."""
        pairs = (self.prompts, self.tokens), (self.real, self.mask)
        ids, real = (
            torch.cat([asked.repeat_interleave(self.samples, 0), said], 1) for asked, said in pairs
        )
        return ids, real


def policy_of(model: Any) -> Policy:
    """The weights of a transformers Qwen3, copied and fused."""
    config, weights = model.config, dict(model.named_parameters())

    def weight(*names: str) -> Tensor:
        found = torch.cat([weights[f"model.{name}.weight"].detach() for name in names])
        return torch.nn.Parameter(found.clone())

    def layer(number: int) -> Layer:
        at = f"layers.{number}"
        return Layer(
            attention_norm=weight(f"{at}.input_layernorm"),
            qkv=weight(*(f"{at}.self_attn.{name}_proj" for name in "qkv")),
            query_norm=weight(f"{at}.self_attn.q_norm"),
            key_norm=weight(f"{at}.self_attn.k_norm"),
            out=weight(f"{at}.self_attn.o_proj"),
            mlp_norm=weight(f"{at}.post_attention_layernorm"),
            gate_up=weight(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
            down=weight(f"{at}.mlp.down_proj"),
        )

    sizes = Sizes(
        heads=config.num_attention_heads,
        shared=config.num_key_value_heads,
        width=config.head_dim,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
    )
    layers = tuple(layer(number) for number in range(config.num_hidden_layers))
    return Policy(sizes, weight("embed_tokens"), layers, weight("norm"))


@torch.no_grad()
def write_policy(policy: Policy, model: Any) -> None:
    """Copies the weights into a transformers Qwen3 of the same sizes."""
    weights = dict(model.named_parameters())

    def put(values: Tensor, *names: str) -> None:
        parts = [weights[f"model.{name}.weight"] for name in names]
        for part, value in zip(parts, values.split([len(part) for part in parts]), strict=True):
            part.copy_(value)

    put(policy.embedding, "embed_tokens")
    put(policy.norm, "norm")
    for number, layer in enumerate(policy.layers):
        at = f"layers.{number}"
        put(layer.attention_norm, f"{at}.input_layernorm")
        put(layer.qkv, *(f"{at}.self_attn.{name}_proj" for name in "qkv"))
        put(layer.query_norm, f"{at}.self_attn.q_norm")
        put(layer.key_norm, f"{at}.self_attn.k_norm")
        put(layer.out, f"{at}.self_attn.o_proj")
        put(layer.mlp_norm, f"{at}.post_attention_layernorm")
        put(layer.gate_up, f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        put(layer.down, f"{at}.mlp.down_proj")


def rotations(sizes: Sizes, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of each position, `position 1 width`, for `rotated`."""
    half = torch.arange(0, sizes.width, 2).float() / sizes.width
    angles = positions.float()[:, None] / sizes.theta**half
    sine = angles.sin()
    return torch.cat([angles.cos()] * 2, -1)[:, None], torch.cat([-sine, sine], -1)[:, None]


def rotated(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, `position heads width`, at their positions."""
    return heads * turn[0] + heads.roll(heads.shape[-1] // 2, -1) * turn[1]


def projected(
    policy: Policy, layer: Layer, hidden: Tensor, turn: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of flat positions, each `position heads width`."""
    sizes, width = policy.sizes, policy.sizes.width
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, sizes.eps)
    heads = F.linear(normed, layer.qkv).view(len(hidden), -1, width)
    both = sizes.heads + sizes.shared
    scales = torch.cat(
        [layer.query_norm.expand(sizes.heads, -1), layer.key_norm.expand(sizes.shared, -1)]
    )
    turned = rotated(F.rms_norm(heads[:, :both], (width,), None, sizes.eps) * scales, turn)
    return turned[:, : sizes.heads], turned[:, sizes.heads :], heads[:, both:]


def mixed(policy: Policy, layer: Layer, hidden: Tensor, heads: Tensor) -> Tensor:
    """The residual stream of flat positions after a layer, from what its heads have read."""
    hidden = hidden + F.linear(heads, layer.out)
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, policy.sizes.eps)
    gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
    return hidden + F.linear(F.silu(gate) * up, layer.down)


def logits_of(policy: Policy, hidden: Tensor) -> Tensor:
    """Logits of the next token after each position."""
    normed = F.rms_norm(hidden, hidden.shape[-1:], policy.norm, policy.sizes.eps)
    return F.linear(normed, policy.embedding)


def prompts_attended(
    policy: Policy, heads: tuple[Tensor, ...], shape: tuple[int, int], bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the positions of prompts read, their keys and values, and the attention.

    Args:
        policy: The policy.
        heads: Queries, keys and values of the flat positions, `position heads width`.
        shape: Number of prompts, and positions of each.
        bias: Added to the scores, `prompt query key`.

    Returns:
        What was read, flat as the queries; keys and values, `shared*prompt position width`; and
        probabilities, `shared prompt each query key`.
    """
    query, key, value = heads
    shared, width = policy.sizes.shared, policy.sizes.width
    asked = query.view(*shape, shared, -1, width).permute(2, 0, 3, 1, 4)
    each = asked.shape[2]
    asked = asked.reshape(shared * shape[0], -1, width) * width**-0.5
    key, value = (
        found.view(*shape, shared, width).permute(2, 0, 1, 3).reshape(-1, shape[1], width)
        for found in (key, value)
    )
    scores = torch.bmm(asked, key.transpose(1, 2)).view(shared, shape[0], each, shape[1], -1)
    shares = (scores + bias[None, :, None]).softmax(-1)
    read = torch.bmm(shares.view(len(key), -1, shape[1]), value)
    read = read.view(shared, shape[0], each, shape[1], width).permute(1, 3, 0, 2, 4)
    return read.reshape(shape[0] * shape[1], -1), key, value, shares


def responses_attended(
    policy: Policy,
    heads: tuple[Tensor, ...],
    asked: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    bias: Tensor,
) -> Tensor:
    """What the positions of responses read of their prompt and of themselves, flat.

    Args:
        policy: The policy.
        heads: Queries, keys and values of the flat positions, `position heads width`.
        asked: Keys and values of the prompts, see `prompts_attended`.
        shape: Number of prompts, responses to each, and positions of a response.
        bias: Added to the scores, `prompt query key`, keys of the prompt first.
    """
    query, key, value = heads
    prompts, samples, length = shape
    shared, width, start = policy.sizes.shared, policy.sizes.width, asked[0].shape[1]
    # Heads come first, so that all responses to a prompt are one product with its keys.
    query = query.view(*shape, shared, -1, width).permute(3, 0, 1, 4, 2, 5)
    each = query.shape[3]
    query = query.reshape(shared * prompts, -1, width) * width**-0.5
    key, value = (
        found.view(*shape, shared, width).permute(3, 0, 1, 2, 4).reshape(-1, length, width)
        for found in (key, value)
    )
    own = query.view(len(key), -1, width)
    far = torch.bmm(query, asked[0].transpose(1, 2)).view(len(key), -1, start)
    scores = torch.cat([far, torch.bmm(own, key.transpose(1, 2))], -1)
    scores = scores.view(shared, prompts, samples, each, length, -1) + bias[None, :, None, None]
    shares = scores.softmax(-1).view(len(key), -1, start + length)
    far = torch.bmm(shares[..., :start].reshape(shared * prompts, -1, start), asked[1])
    read = far.view(own.shape) + torch.bmm(shares[..., start:], value)
    read = read.view(shared, prompts, samples, each, length, width).permute(1, 2, 4, 0, 3, 5)
    return read.reshape(prompts * samples * length, -1)


def response_log_probs(policy: Policy, rollout: Rollout) -> Tensor:
    """Log-probability of each response token under the policy, with a graph, `batch token`.

    Each prompt is computed once, and all responses to it read its keys and values.
    """
    count, start = rollout.prompts.shape
    rows, length = len(rollout.tokens), rollout.tokens.shape[1] - 1
    said, edge = rollout.tokens[:, :length], count * start
    places = torch.cat(
        [torch.arange(start).repeat(count), start + torch.arange(length).repeat(rows)]
    )
    turn = rotations(policy.sizes, places)
    asked_bias, said_bias = _biases(rollout.real, length)
    hidden = policy.embedding[torch.cat([rollout.prompts.flatten(), said.flatten()])]
    for layer in policy.layers:
        heads = projected(policy, layer, hidden, turn)
        first, *asked, _ = prompts_attended(
            policy, tuple(each[:edge] for each in heads), (count, start), asked_bias
        )
        shape = (count, rollout.samples, length)
        own = tuple(each[edge:] for each in heads)
        then = responses_attended(policy, own, (asked[0], asked[1]), shape, said_bias)
        hidden = mixed(policy, layer, hidden, torch.cat([first, then]))
    last = hidden[:edge].view(count, start, -1)[:, -1:].repeat_interleave(rollout.samples, 0)
    deciding = torch.cat([last, hidden[edge:].view(rows, length, -1)], 1)
    log_probs = logits_of(policy, deciding).log_softmax(-1)
    return log_probs.gather(-1, rollout.tokens[..., None])[..., 0]


def _biases(real: Tensor, length: int) -> tuple[Tensor, Tensor]:
    # A padded query sees padding only; its row of equal scores is read by nobody.
    start = real.shape[1]
    padding = torch.where(real, 0.0, HIDDEN)[:, None]
    asked = padding + torch.full((start, start), HIDDEN).triu(1)
    own = torch.full((length, length), HIDDEN).triu(1).expand(len(real), -1, -1)
    return asked, torch.cat([padding.expand(-1, length, -1), own], -1)


def nucleus_draws(shares: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """One token a row from the fewest likeliest ones whose probabilities reach `top_p`.

    Args:
        shares: Probabilities, `row vocabulary`.
        draws: Uniform numbers in [0, 1), ` row`.
        top_p: Probability to reach; 1 for all tokens.
    """
    most, tokens = shares.max(-1)
    open_rows = (most < top_p).nonzero()[:, 0]
    if len(open_rows):  # all other rows have one token to choose from
        chosen = shares[open_rows]
        ordered, _ = chosen.sort(-1, descending=True)
        inside = (ordered.cumsum(-1) - ordered) < top_p
        least = torch.where(inside, ordered, 2.0).amin(-1, keepdim=True)
        mass = torch.where(chosen >= least, chosen, 0.0).cumsum(-1)
        drawn = draws[open_rows, None] * mass[:, -1:]
        # Rounding may carry a draw past the mass: the last token with any is meant then.
        drawn = torch.minimum(drawn, mass[:, -1:] * (1 - 1e-6))
        tokens = tokens.index_copy(0, open_rows, (mass <= drawn).sum(-1))
    return tokens


class _Cache:
    """Keys and values of the rows that are still written, who they are, and what they hide."""

    def __init__(self, sizes: Sizes, depth: int, hidden: Tensor):
        rows, longest = hidden.shape
        self.values = torch.empty(depth, 2, rows, sizes.shared, longest, sizes.width)
        self.rows, self.bias = torch.arange(rows), hidden[:, None, None]

    def put(self, layer: int, at: int, key: Tensor, value: Tensor) -> None:
        self.values[layer, 0, :, :, at : at + key.shape[2]] = key
        self.values[layer, 1, :, :, at : at + key.shape[2]] = value

    def keep(self, rows: Tensor, upto: int) -> None:
        shape = list(self.values.shape)
        shape[2] = len(rows)
        kept = self.values.new_empty(shape)
        kept[..., :upto, :] = self.values[..., :upto, :].index_select(2, rows)
        self.values, self.rows, self.bias = kept, self.rows[rows], self.bias[rows]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the left, and where they are real."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + [*row] for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    return ids, torch.arange(width) >= width - lengths[:, None]


@torch.no_grad()
def sampled(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    longest: int,
    generator: torch.Generator,
    top_p: float = 0.95,
    layers: Sequence[int] = (),
    entropy: bool = False,
) -> Rollout:
    """Responses to prompts at temperature 1, and what was read while they were sampled.

    Args:
        policy: The policy.
        prompts: Token ids of each prompt.
        samples: Responses to a prompt.
        longest: Most tokens of a response.
        generator: Source of the draws; a token's draw depends on its row and place only.
        top_p: Tokens are drawn from the fewest likeliest ones that reach this probability.
        layers: Layers whose attention entropy is read.
        entropy: Whether the predictive entropy is read.

    Returns:
        The rollout.
    """
    ids, real = padded(prompts)
    rows, start = len(ids) * samples, ids.shape[1]
    hide = torch.where(real, 0.0, HIDDEN).repeat_interleave(samples, 0)
    cache = _Cache(policy.sizes, len(policy.layers), F.pad(hide, (0, longest)))
    names = ("log_probs", *(("entropy",) if entropy else ()), *layers)
    read: dict[Any, Tensor] = {name: torch.zeros(rows, longest) for name in names}
    tokens = torch.full((rows, longest), PAD)
    lengths = torch.full((rows,), longest)
    draws = torch.rand(longest, rows, generator=generator)
    turns = rotations(policy.sizes, torch.arange(start + longest))
    visible = real.sum(-1).repeat_interleave(samples)
    hidden, seen = _prompt_pass(policy, ids, real, cache, samples, turns, layers)
    running = torch.ones(rows, dtype=torch.bool)
    for step in range(longest):
        log_shares = logits_of(policy, hidden).log_softmax(-1)
        shares, mine = log_shares.exp(), cache.rows
        drawn = nucleus_draws(shares, draws[step, mine], top_p)
        drawn = torch.where(running[mine], drawn, PAD)
        tokens[mine, step] = drawn
        read["log_probs"][mine, step] = log_shares.gather(-1, drawn[:, None])[:, 0]
        if entropy:
            read["entropy"][mine, step] = -(shares * log_shares).sum(-1)
        for layer, attention in seen.items():
            many = (visible[mine] + step).clamp(min=2).log()
            read[layer][mine, step] = torch.special.entr(attention).sum(-1) / many
        ended = mine[(drawn == END) & running[mine]]
        lengths[ended] = step + 1
        running[ended] = False
        going = running[mine].nonzero()[:, 0]
        if not len(going) or step + 1 == longest:
            break
        if len(going) <= 0.8 * len(mine):  # dropping rows copies the cache: not at every end
            cache.keep(going, start + step)
            drawn = drawn[going]
        hidden, seen = _token_pass(policy, drawn, cache, start + step, turns, layers)
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    read = {name: torch.where(mask, values[:, :width], 0.0) for name, values in read.items()}
    log_probs, predictive = read.pop("log_probs"), read.pop("entropy", None)
    tokens = torch.where(mask, tokens[:, :width], PAD)
    return Rollout(ids, real, tokens, mask, log_probs, predictive, read)


def _prompt_pass(
    policy: Policy,
    ids: Tensor,
    real: Tensor,
    cache: _Cache,
    samples: int,
    turns: tuple[Tensor, Tensor],
    layers: Sequence[int],
) -> tuple[Tensor, dict[Any, Tensor]]:
    """Fills the cache with the prompts; the last position's stream and attention of each row."""
    count, start = ids.shape
    turn = (turns[0][:start].repeat(count, 1, 1), turns[1][:start].repeat(count, 1, 1))
    bias, _ = _biases(real, 0)
    hidden, seen, shared = policy.embedding[ids.flatten()], {}, policy.sizes.shared
    for number, layer in enumerate(policy.layers):
        heads = projected(policy, layer, hidden, turn)
        read, *found, shares = prompts_attended(policy, heads, (count, start), bias)
        rows = [each.view(shared, count, start, -1).transpose(0, 1) for each in found]
        cache.put(number, 0, *(each.repeat_interleave(samples, 0) for each in rows))
        if number in layers:
            seen[number] = shares[..., -1, :].mean((0, 2)).repeat_interleave(samples, 0)
        hidden = mixed(policy, layer, hidden, read)
    last = hidden.view(count, start, -1)[:, -1]
    return last.repeat_interleave(samples, 0), seen


def _token_pass(
    policy: Policy,
    tokens: Tensor,
    cache: _Cache,
    at: int,
    turns: tuple[Tensor, Tensor],
    layers: Sequence[int],
) -> tuple[Tensor, dict[Any, Tensor]]:
    """One more token of each row: its stream, and its attention averaged over heads."""
    turn, seen = (turns[0][at], turns[1][at]), {}
    hidden, sizes, rows = policy.embedding[tokens], policy.sizes, len(tokens)
    for number, layer in enumerate(policy.layers):
        query, key, value = projected(policy, layer, hidden, turn)
        cache.put(number, at, key[:, :, None], value[:, :, None])
        keys, values = cache.values[number, :, :, :, : at + 1]
        query = query.reshape(rows, sizes.shared, -1, sizes.width) * sizes.width**-0.5
        scores = query @ keys.transpose(-1, -2) + cache.bias[..., : at + 1]
        shares = scores.softmax(-1)
        if number in layers:
            seen[number] = shares.mean((1, 2))
        hidden = mixed(policy, layer, hidden, (shares @ values).view(rows, -1))
    return hidden, seen


def part_of(rollout: Rollout, prompts: Tensor) -> Rollout:
    """The rows of some prompts, without columns and positions that are padding in all of them."""
    each = torch.arange(rollout.samples)
    rows = (prompts[:, None] * rollout.samples + each).flatten()
    mask, real = rollout.mask[rows], rollout.real[prompts]
    width, first = int(mask.sum(-1).max()), int(real.long().argmax(-1).min())
    return replace(
        rollout,
        prompts=rollout.prompts[prompts, first:],
        real=real[:, first:],
        tokens=rollout.tokens[rows, :width],
        mask=mask[:, :width],
        log_probs=rollout.log_probs[rows, :width],
        predictive_entropy=None,
        attention={},
    )


def group_advantages(rewards: Tensor, samples: int) -> Tensor:
    """Rewards minus the mean of their prompt's, over its standard deviation, ` batch`."""
    groups = rewards.view(-1, samples)
    spread = groups.std(1, keepdim=True) + 1e-4
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def accumulate_gradient(
    policy: Policy, rollout: Rollout, advantages: Tensor, *, parts: int = 4
) -> None:
    """Adds the gradient of the clipped loss over all response tokens to that of the weights.

    Args:
        policy: The policy.
        rollout: Its rollout.
        advantages: With token weights and the recipe's scale in them, `batch token`.
        parts: Passes into which the prompts are split, those of equal length together.
    """
    count = rollout.mask.sum()
    alive = (advantages.view(len(rollout.prompts), -1) != 0).any(-1).nonzero()[:, 0]
    if not len(alive):
        return
    lengths = rollout.mask.sum(-1).view(len(rollout.prompts), -1).amax(-1)
    alive = alive[lengths[alive].argsort()]
    for prompts in alive.chunk(min(parts, len(alive))):
        part = part_of(rollout, prompts)
        rows = (prompts[:, None] * rollout.samples + torch.arange(rollout.samples)).flatten()
        weighted = advantages[rows, : part.mask.shape[1]]
        log_probs = response_log_probs(policy, part)
        # The policy has sampled the rollout itself: the ratio is 1, and only its gradient counts.
        losses = tw.clipped_surrogate_loss(log_probs, log_probs.detach(), weighted)
        tw.weighted_token_mean(losses, part.mask, count=count).backward()
