"""A tiny causal transformer in plain torch, exact in float64, and a batch of policy losses."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenweights as tw

VOCABULARY, WIDTH, PROMPT = 11, 8, 3


class Block(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.attention(hidden).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / WIDTH**0.5
        length = hidden.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        hidden = hidden + self.dropout(self.output(weights @ value))
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Policy(nn.Module):
    def __init__(self, *, dropout: float = 0.0, checkpointed: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(dropout), Block(dropout)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("passes", torch.zeros(()))
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.embedding(ids)
        for layer in self.layers:
            if self.checkpointed:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return self.head(hidden)


def policy(dtype: torch.dtype = torch.float64, *, order: int = 0, **options) -> Policy:
    """A policy; another order of its hidden units makes another rounding and nothing else."""
    torch.manual_seed(3)
    model = Policy(**options)
    if order:
        reorder(model, order)
    return model.to(dtype)


@torch.no_grad()
def reorder(model: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, inner, query, value = (
        torch.randperm(size, generator=generator) for size in (WIDTH, 2 * WIDTH, WIDTH, WIDTH)
    )
    attended = torch.cat([query, WIDTH + query, 2 * WIDTH + value])
    changes = [(model.embedding.weight, None, width), (model.head.weight, None, width)]
    for layer in model.layers:
        for linear, rows, columns in (
            (layer.attention, attended, width),
            (layer.output, width, value),
            (layer.up, inner, width),
            (layer.down, width, inner),
        ):
            changes += [(linear.weight, rows, columns), (linear.bias, rows, None)]
    for parameter, rows, columns in changes:
        values = parameter if rows is None else parameter[rows]
        parameter.copy_(values if columns is None else values[:, columns])


class Batch:
    """Ids, mask and the clipped surrogate loss of a slice of rows under any policy."""

    def __init__(self, *, rows: int = 4, tokens: int = 12, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(VOCABULARY, (rows, PROMPT + tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths
        self.advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).to(dtype)
        self.old = torch.full((rows, tokens), -2.4, dtype=dtype)
        self.scores = torch.rand(rows, tokens, generator=generator)
        self.deciles = tw.quantile_bins(self.scores, self.mask, bins=10)

    def loss(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        ids = self.ids[rows]
        log_probs = model(ids)[:, PROMPT - 1 : -1].log_softmax(-1)
        log_probs = log_probs.gather(-1, ids[:, PROMPT:, None])[..., 0]
        return tw.clipped_surrogate_loss(
            # Wide clip bounds: a clipped token has no gradient to look at.
            log_probs,
            self.old[rows],
            self.advantages[rows],
            clip_low=1.0,
            clip_high=100.0,
            mask=self.mask[rows],
        )


def jacobian(model: nn.Module, batch: Batch) -> Tensor:
    """Gradient of every valid token's loss, `valid parameter`, one backward pass for each."""
    loss = batch.loss(model)
    rows = [
        torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        for value in loss[batch.mask]
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
