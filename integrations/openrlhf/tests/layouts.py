"""The layouts of a training step that OpenRLHF offers."""

import pytest


def layout(ranks, zero, *options, packed=False, dynamic=False):
    if dynamic:
        options = (*options, "--train.dynamic_batch_enable")
    name = f"{ranks}-zero{zero}" + "-packed" * packed + "-dynamic" * dynamic
    settings = {"ranks": ranks, "packed": packed}
    return pytest.param(("--ds.zero_stage", zero, *options), settings, id=name)


LAYOUTS = [
    *(layout(ranks, zero) for ranks in (1, 2) for zero in (2, 3)),
    *(layout(ranks, zero, packed=True) for ranks in (1, 2) for zero in (2, 3)),
    *(layout(ranks, 3, packed=True, dynamic=True) for ranks in (1, 2)),
]
