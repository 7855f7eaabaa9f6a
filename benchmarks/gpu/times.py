"""Times and peak memory of attention entropy and its contenders, by length."""

from argparse import Namespace

from step import Parts, Run, kernels_run


def parts(run: Run) -> Parts:
    """Measurements at each length; those that matter most come first."""
    lengths = (48,) if run.toy else tuple(1024 * k for k in (16, 32, 1, 2, 4, 8, 64, 128))
    return {f"{tokens} tokens": lambda tokens=tokens: times(run, tokens) for tokens in lengths}


def times(run: Run, tokens: int) -> list[dict]:
    """Every contender at one length, each found to agree with the reference first."""
    from layer import layers
    from report import measured

    kernels_run(run)
    sizes = Namespace(tokens=[tokens], heads=None, kv_heads=None, dim=None)
    seconds = 0.0 if run.toy else 1.0
    options = Namespace(**vars(sizes), device=run.device.type, toy=run.toy, seconds=seconds)
    names = ["entropy", "all statistics", "received", "attention forward"]
    options.only = names if run.toy else None
    options.clock = 1.98e9
    return [vars(measurement) for measurement in measured(layers(options)[0], options)]
