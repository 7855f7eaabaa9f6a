"""The layouts of a training step that OpenRLHF offers."""

import pytest


def layout(ranks, zero, *options, packed=False, dynamic=False, ring=1):
    if dynamic:
        options = (*options, "--train.dynamic_batch_enable")
    if ring > 1:
        options = (*options, "--ds.ring_attn_size", ring)
    name = f"{ranks}-zero{zero}" + "-packed" * packed + "-dynamic" * dynamic + "-ring" * (ring > 1)
    settings = {"ranks": ranks, "packed": packed}
    return pytest.param(("--ds.zero_stage", zero, *options), settings, id=name)


LAYOUTS = [
    *(layout(ranks, zero) for ranks in (1, 2) for zero in (2, 3)),
    *(layout(ranks, zero, packed=True) for ranks in (1, 2) for zero in (2, 3)),
    *(layout(ranks, 3, packed=True, dynamic=True) for ranks in (1, 2)),
    # The slicing is OpenRLHF's; stand_ins/ring_flash_attn.py computes the attention.
    layout(2, 2, packed=True, ring=2),
    layout(2, 3, packed=True, dynamic=True, ring=2),
]
