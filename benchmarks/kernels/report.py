"""One command: agreement first, then times, memory and figures of the attention entropy.

`python benchmarks/kernels/report.py --device cuda` on a GPU; `--device cpu` times the chunked
backend; `--device cpu --toy` runs everything at a few tokens in seconds, the Triton kernels in
their interpreter. Writes `results.md`, `results.json`, `times.png` and `memory.png` to `--output`.
`--tune` times other tile sizes of the entropy kernel instead.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenweights import TokenWeightsError

TOLERANCE = 1e-5
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Setting:
    """One layer: a single causal sequence with grouped-query attention."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as a projection leaves them: scores of a few units."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = [(1, count, self.tokens, self.dim) for count in (self.heads, self.kv_heads)]
        drawn = [torch.randn(s, generator=generator, device=self.device) for s in shapes]
        return drawn[0].to(self.dtype), drawn[1].to(self.dtype)


@dataclass(frozen=True)
class Measurement:
    """Seconds at the 20th, 50th and 80th percentile, and bytes beyond the inputs."""

    name: str
    tokens: int
    p20: float
    p50: float
    p80: float
    peak_bytes: int | None
    of_floor: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--toy", action="store_true", help="a few tokens, to see it run")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender and length")
    parser.add_argument("--clock", type=float, default=1.98e9, help="of the GPU, in Hz")
    parser.add_argument("--only", nargs="+", help="contenders whose names start so")
    parser.add_argument("--tune", action="store_true", help="time tile sizes instead")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.toy and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # Compiled once per length, and without a word about it.
    torch._dynamo.config.recompile_limit = 64
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.tune:
        for line in tuned(settings(arguments)[-1], arguments.seconds):
            print(line, flush=True)
        return
    measurements = []
    for setting in settings(arguments):
        measurements += measured(setting, arguments)
    write(measurements, settings(arguments)[0], arguments)


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """The lengths to measure; the layer is that of an 8B model on a GPU, smaller on a CPU."""
    gpu = arguments.device == "cuda"
    tokens = arguments.tokens or ([2**power for power in range(10, 18)] if gpu else [1024, 4096])
    if arguments.toy and not arguments.tokens:
        tokens = [48, 96]
    heads, kv_heads, dim = (32, 8, 128) if gpu else (16, 16, 64)
    if arguments.toy:
        heads, kv_heads, dim = 4, 2, 64
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        Setting(
            count,
            arguments.heads or heads,
            arguments.kv_heads or kv_heads,
            arguments.dim or dim,
            dtype,
            torch.device(arguments.device),
        )
        for count in tokens
    ]


def measured(setting: Setting, arguments: argparse.Namespace) -> list[Measurement]:
    """All contenders at one length, after ours have been found to agree with the reference."""
    from contenders import contenders, log_sum_exp, needs_matrix

    backend = "triton" if arguments.device == "cuda" or arguments.toy else "chunked"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        backend = "chunked"
    query, key = setting.inputs()
    lse = log_sum_exp(query, key)
    check_agreement(query, key, lse, backend)
    least = least_seconds(setting, arguments)
    results = []
    for name, function in contenders(arguments.device, backend).items():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        if needs_matrix(name) and 3 * 4 * setting.heads * setting.tokens**2 > memory(setting):
            print(f"{name}: skipped at {setting.tokens} tokens, the matrix does not fit")
            continue
        try:
            check_entropy(name, function, query, key, lse)
            times = seconds(lambda f=function: f(query, key, lse), setting, arguments)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, TokenWeightsError):
                raise
            print(f"{name}: not available here ({type(error).__name__}: {str(error)[:120]})")
            continue
        p20, p50, p80 = quantiles(times)
        # The CPU's floor is a whole softmax, a GPU's is one pass over known denominators.
        passes = 2 if name == "entropy" and setting.device.type == "cuda" else 1
        share = None
        if least is not None and not name.startswith("attention forward"):
            share = passes * least / p50
        peak = peak_bytes(lambda f=function: f(query, key, lse), setting)
        results.append(Measurement(name, setting.tokens, p20, p50, p80, peak, share))
        shown = "" if share is None else f", {100 * share:.0f}% of the floor"
        print(f"T={setting.tokens} {name}: {1e3 * p50:.3f} ms{shown}", flush=True)
    return results


def check_agreement(query, key, lse, backend: str) -> None:
    """Every statistic of some rows against the float64 reference, before anything is timed."""
    from tokenweights import attention_statistics

    everything = attention_statistics(query, key, backend=backend)
    given = attention_statistics(query, key, lse=lse, backend=backend)
    tokens = query.shape[2]
    for stop in sorted({tokens, tokens // 2 + 1, min(tokens, 130)}):
        rows = slice(max(stop - CHECKED_ROWS, 0), stop)
        wanted = attention_statistics(query[:, :, rows], key[:, :, :stop], backend="reference")
        for found in (everything, given):
            for kind, value in vars(wanted).items():
                difference = (getattr(found, kind)[:, rows] - value).abs()
                if kind == "support_size":
                    assert int(difference.max()) <= 1, (kind, stop)
                else:
                    worst = float((difference / value.abs().clamp_min(1.0)).max())
                    assert worst <= TOLERANCE, (kind, stop, worst)


def check_entropy(name: str, function: Callable, query, key, lse) -> None:
    """Another implementation's entropy against the reference; half-precision ones are coarse."""
    from tokenweights import attention_entropy

    if name.startswith(("attention forward", "all statistics")):
        return
    last = query[:, :, -CHECKED_ROWS:]
    wanted = attention_entropy(last, key, backend="reference")
    error = (function(query, key, lse)[:, -CHECKED_ROWS:] - wanted).abs().max()
    # Those that round scores to the input's type have its precision.
    limit = TOLERANCE if name.startswith("entropy") or query.dtype == torch.float32 else 5e-3
    assert float(error) <= limit, (name, float(error))


def seconds(function: Callable[[], object], setting: Setting, arguments) -> list[float]:
    """Times of single calls: GPU events with a cold L2 cache, or CPU time of this process."""
    function()
    spent: list[float] = []
    gpu = setting.device.type == "cuda"
    flushed = torch.empty(2**28, dtype=torch.int8, device=setting.device) if gpu else None
    begin = time.perf_counter()
    while len(spent) < (1 if arguments.toy else 5) or (
        time.perf_counter() - begin < arguments.seconds and len(spent) < 200 and not arguments.toy
    ):
        if flushed is None:
            start = time.process_time()
            function()
            spent.append(time.process_time() - start)
            continue
        flushed.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()
        spent.append(events[0].elapsed_time(events[1]) / 1e3)
    return spent


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def peak_bytes(function: Callable[[], object], setting: Setting) -> int | None:
    """Memory beyond what was allocated before; on a CPU see test_attention_entropy.py."""
    if setting.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(setting: Setting) -> float:
    """Bytes that a contender may take."""
    if setting.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def least_seconds(setting: Setting, arguments: argparse.Namespace) -> float | None:
    """The floor of one pass: from measured rates on a GPU, the passes themselves on a CPU."""
    if setting.device.type == "cuda":
        from roofline import floor, measured_rates

        rates = measured_rates(setting.device, setting.dtype, arguments.clock)
        found = floor(setting.tokens, setting.heads, setting.dim, rates)
        print(
            f"T={setting.tokens} floor of one pass: products {1e3 * found.products:.3f} ms at "
            f"{rates.products / 1e12:.0f} TFLOP/s, exponentials {1e3 * found.exponentials:.3f} ms"
        )
        return found.seconds
    if arguments.toy or setting.heads != setting.kv_heads:
        return None
    from test_attention_entropy import floor as cpu_floor

    query, key = setting.inputs()
    return quantiles(seconds(lambda: cpu_floor(query, key), setting, arguments))[1]


def tuned(setting: Setting, budget: float):
    """Times of the entropy kernel, log-sum-exp given, over tile sizes; on a GPU only."""
    from contenders import log_sum_exp

    from tokenweights.attention.layout import padded_batch
    from tokenweights.attention.results import empty_results
    from tokenweights.attention.statistics import Logits, Request
    from tokenweights.attention.triton_backend import triton_sweep
    from tokenweights.attention.triton_configuration import Configuration, Tiles

    query, key = setting.inputs()
    batch = padded_batch(query, key, None, log_sum_exp(query, key))
    request, logits = Request(("normalized",)), Logits(setting.dim**-0.5)
    arguments = argparse.Namespace(toy=False, seconds=budget / 4)
    for rows, keys, warps in [(64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8), (64, 256, 8)]:
        for stages in (1, 2, 3):
            for unrolled in (False, True):
                tiles = Tiles(rows, keys, warps, stages)
                configuration = Configuration(
                    tiles, tiles, tiles, descriptors=True, unrolled=unrolled
                )

                def run(configuration=configuration):
                    results = empty_results(request, (1, 1, setting.tokens), query)
                    triton_sweep(
                        "tune",
                        batch,
                        request,
                        logits,
                        results,
                        per_head=False,
                        sinks=None,
                        workspace_bytes=2**28,
                        configuration=configuration,
                    )

                name = f"{rows}x{keys} {warps} warps, {stages} stages" + ", unrolled" * unrolled
                try:
                    _, p50, _ = quantiles(seconds(run, setting, arguments))
                    yield f"T={setting.tokens} {name}: {1e3 * p50:.3f} ms"
                except Exception as error:
                    yield f"T={setting.tokens} {name}: {type(error).__name__}"


def write(measurements: list[Measurement], setting: Setting, arguments) -> None:
    """A Markdown table with the machine above it, the numbers as JSON, and two figures."""
    lines = [environment(setting), "", "| tokens | what | p20 ms | p50 ms | p80 ms |"]
    lines[-1] += " peak MiB | of the floor |"
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for m in measurements:
        peak = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.0f}"
        share = "" if m.of_floor is None else f"{100 * m.of_floor:.0f} %"
        times = " | ".join(f"{1e3 * value:.3f}" for value in (m.p20, m.p50, m.p80))
        lines.append(f"| {m.tokens} | {m.name} | {times} | {peak} | {share} |")
    (arguments.output / "results.md").write_text("\n".join(lines) + "\n")
    records = [vars(m) for m in measurements]
    (arguments.output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    figure(measurements, "p50", "seconds", arguments.output / "times.png")
    if any(m.peak_bytes is not None for m in measurements):
        figure(measurements, "peak_bytes", "bytes", arguments.output / "memory.png")
    print(f"wrote {arguments.output}")


def environment(setting: Setting) -> str:
    """Machine, versions and layer."""
    from conftest import processor

    device = processor() + ", one thread"
    if setting.device.type == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if importlib.util.find_spec("triton"):
        import triton

        versions += f", triton {triton.__version__}"
    heads = f"H={setting.heads}, Hkv={setting.kv_heads}, D={setting.dim}"
    return f"{device}; {versions}; B=1, {heads}, {str(setting.dtype).removeprefix('torch.')}"


def figure(measurements: list[Measurement], field: str, label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(m.name for m in measurements):
        points = [m for m in measurements if m.name == name and getattr(m, field)]
        tokens = [m.tokens for m in points]
        ours = name.startswith(("entropy", "all statistics"))
        style = "-" if ours else ":" if name.startswith("attention") else "--"
        axes.plot(tokens, [getattr(m, field) for m in points], style, marker="o", ms=3, label=name)
        if field == "p50":
            axes.fill_between(tokens, [m.p20 for m in points], [m.p80 for m in points], alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
