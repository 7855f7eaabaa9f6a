"""Times of the kernels over tile sizes, next to those of the tiles that are shipped."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from contenders import HORIZON, log_sum_exp
from layer import Layer
from timing import quantiles, seconds

from tokenweights.attention.layout import padded_batch
from tokenweights.attention.received import Received
from tokenweights.attention.results import empty_results
from tokenweights.attention.statistics import STATISTIC_KINDS, Logits, Request
from tokenweights.attention.triton_backend import triton_sweep
from tokenweights.attention.triton_configuration import Configuration, Tiles, shipped_configuration
from tokenweights.attention.triton_received import column_tiles

# What a set of tiles serves, what has to be asked for to use it, and whether denominators are
# given. Those are verified by a pass of the rows, which columns do without.
ROLES = {
    "weights": (("normalized",), True),
    "sums": (STATISTIC_KINDS, True),
    "denominators": (("normalized",), False),
    "columns": ((), False),
}
SHAPES = ((64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8), (64, 256, 8))
# Where keys are shared as well, the compiler waits for a product before any exponential.
FORMS = ({"shared": True}, {"overlapped": True})


def tuned(layer: Layer, budget: float, *, toy: bool) -> Iterator[dict[str, str | float | None]]:
    """Milliseconds for each choice of tiles, None with the reason where it does not run.

    Args:
        layer: Its log-sum-exp is given, except for the tiles that compute it.
        budget: Seconds per choice.
        toy: Few and small tiles, as the interpreter can bear them.
    """
    query, key = layer.inputs()
    lse = log_sum_exp(query, key)
    base = shipped_configuration(query, key)
    for role, (kinds, given) in ROLES.items():
        batch = padded_batch(query, key, None, lse if given else None)
        for name, configuration in candidates(base, role, query.element_size(), toy=toy):
            received = Received(HORIZON) if role == "columns" else None
            request = Request(kinds, support_mass=(0.5, 0.8, 0.9, 0.95), received=received)
            run = partial(sweep, layer, query, batch, request, configuration)
            record: dict[str, str | float | None] = {"role": role, "tiles": name, "ms": None}
            try:
                record["ms"] = 1e3 * quantiles(seconds(run, layer, budget))[1]
            except Exception as error:  # out of shared memory or registers, as the launch finds
                record["reason"] = f"{type(error).__name__}: {str(error)[:80]}"
            yield record


def candidates(
    base: Configuration, role: str, element_bytes: int, *, toy: bool
) -> Iterator[tuple[str, Configuration]]:
    """The shipped tiles, then others in their place."""
    base = replace(base, columns=column_tiles(base, element_bytes))
    yield f"shipped, {getattr(base, role)}", base
    forms = ({}, *FORMS) if role in ("weights", "sums") else ({},)
    if toy:
        shapes, stages, forms = ((32, 32, 1),), (1,), forms[-1:]
    else:
        shapes, stages = SHAPES, (2, 3)
    for shape, loads, form in itertools.product(shapes, stages, forms):
        tiles = Tiles(*shape, loads, **form)
        yield str(tiles), replace(base, **{role: tiles})


def sweep(layer: Layer, query, batch, request: Request, configuration: Configuration) -> None:
    """One call of the Triton backend."""
    results = empty_results(request, (1, 1, layer.tokens), query)
    if request.received is not None:
        results["received"] = torch.zeros(1, 1, layer.tokens, device=query.device)
    triton_sweep(
        "tune",
        batch,
        request,
        Logits(layer.dim**-0.5),
        results,
        per_head=False,
        sinks=None,
        workspace_bytes=2**28,
        configuration=configuration,
    )
