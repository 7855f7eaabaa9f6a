"""Times of the kernels over tile sizes, in the layer of an 8B model."""

from step import Parts, Run, kernels_run


def parts(run: Run) -> Parts:
    """Milliseconds by role and tiles, at each length."""
    lengths = (32,) if run.toy else (16384, 32768)
    return {f"{tokens} tokens": lambda tokens=tokens: tuning(run, tokens) for tokens in lengths}


def tuning(run: Run, tokens: int) -> list[dict]:
    """All choices of tiles at one length."""
    from layer import Layer
    from tuning import tuned

    kernels_run(run)
    heads, kv_heads, dim = (4, 2, 16) if run.toy else (32, 8, 128)
    layer = Layer(tokens, heads, kv_heads, dim, run.dtype, run.device)
    return list(tuned(layer, 0.0 if run.toy else 0.2, toy=run.toy))
