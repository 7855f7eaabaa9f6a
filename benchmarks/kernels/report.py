"""One command: agreement, tile sizes, times, memory, roofline and figures of attention entropy.

`python benchmarks/kernels/report.py --device cuda --all` does all of it on a GPU, in three steps
that can be asked for one by one: `--agreement` runs the kernels' test cases on the device, `--tune`
times tile sizes, and `--times` (the default) times every contender at every length, each found to
agree with the float64 reference first. `--device cpu` times the chunked backend; with `--toy`
everything runs at a few tokens in seconds, the Triton kernels in their interpreter.

Each step leaves a JSON file in `--output`, from which `results.md`, `times.png` and `memory.png`
are made, so that steps may run one after another. `--record FILE` also puts the tables into a
results file, between two marks.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenweights import TokenWeightsError

if TYPE_CHECKING:
    from layer import Layer
    from tables import Measurement


# Of products, where it is not one: denominators, or rows that verify given ones; rows; columns.
PASSES = {"entropy": 2, "received, lse given": 2, "received": 2, "entropy and received": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--toy", action="store_true", help="a few tokens, to see it run")
    parser.add_argument("--all", action="store_true", help="agreement, tune and times")
    parser.add_argument("--agreement", action="store_true", help="test cases on the device")
    parser.add_argument("--cases", help="which of them, as pytest's -k")
    parser.add_argument("--tune", action="store_true", help="time tile sizes")
    parser.add_argument("--tune-tokens", type=int, default=16384)
    parser.add_argument("--times", action="store_true", help="time every contender; the default")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender and length")
    parser.add_argument("--clock", type=float, default=1.98e9, help="of the GPU, in Hz")
    parser.add_argument("--only", nargs="+", help="contenders whose names start so")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--record", type=Path, help="results file to put the tables into")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.toy and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.toy:
        arguments.seconds = 0.0
    torch.set_num_threads(1)
    # Compiled once per length, and without a word about it.
    torch._dynamo.config.recompile_limit = 64
    arguments.output.mkdir(parents=True, exist_ok=True)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """The steps that were asked for, then everything written anew from what the steps left."""
    from layer import layers

    some = arguments.agreement or arguments.tune or arguments.times
    if arguments.all or arguments.agreement:
        from agreement import kernel_cases

        counts = kernel_cases(arguments.device, only=arguments.cases)
        print(f"kernel cases: {counts}", flush=True)
        keep(arguments, "agreement", counts)
        if counts["failed"]:
            raise SystemExit("the kernels are wrong on this device: nothing is timed")
    if arguments.all or arguments.tune:
        from tuning import tuned

        arguments_at = argparse.Namespace(**vars(arguments))
        arguments_at.tokens = [48 if arguments.toy else arguments.tune_tokens]
        records = []
        for record in tuned(layers(arguments_at)[0], arguments.seconds / 4, toy=arguments.toy):
            print(record, flush=True)
            records.append(record)
        keep(arguments, "tuning", records)
    if arguments.all or arguments.times or not some:
        measurements = [vars(m) for layer in layers(arguments) for m in measured(layer, arguments)]
        keep(arguments, "results", measurements)
    write(layers(arguments)[0], arguments)


def keep(arguments: argparse.Namespace, step: str, found: Any) -> None:
    """What a step found, as JSON."""
    (arguments.output / f"{step}.json").write_text(json.dumps(found, indent=1) + "\n")


def kept(arguments: argparse.Namespace, step: str, missing: Any) -> Any:
    """What a step found, in this run or before."""
    path = arguments.output / f"{step}.json"
    return json.loads(path.read_text()) if path.exists() else missing


def measured(layer: "Layer", arguments: argparse.Namespace) -> "list[Measurement]":
    """All contenders at one length, after ours have been found to agree with the reference."""
    from agreement import check_entropy, check_statistics
    from contenders import contenders, log_sum_exp, needs_matrix
    from tables import Measurement
    from timing import free_bytes, peak_bytes, quantiles, seconds

    backend = "triton" if arguments.device == "cuda" or arguments.toy else "chunked"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        backend = "chunked"
    query, key = layer.inputs()
    lse = log_sum_exp(query, key)
    check_statistics(query, key, lse, backend)
    least = least_seconds(layer, arguments)
    results = []
    for name, function in contenders(arguments.device, backend, toy=arguments.toy).items():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        if needs_matrix(name) and 12 * layer.heads * layer.tokens**2 > free_bytes(layer):
            results.append(Measurement(name, layer.tokens, missing="the matrix does not fit"))
            continue
        try:
            check_entropy(name, function, query, key, lse)
            times = seconds(lambda f=function: f(query, key, lse), layer, arguments.seconds)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, TokenWeightsError):
                raise
            print(f"{name}: not available here ({type(error).__name__}: {str(error)[:120]})")
            results.append(Measurement(name, layer.tokens, missing="not available here"))
            continue
        p20, p50, p80 = quantiles(times)
        # The CPU's floor is a whole softmax, a GPU's is one pass over known denominators.
        passes = PASSES.get(name, 1) if layer.device.type == "cuda" else 1
        partial = name.startswith("attention forward") or "horizon" in name
        share = None if partial else passes * least / p50
        peak = peak_bytes(lambda f=function: f(query, key, lse), layer)
        results.append(Measurement(name, layer.tokens, p20, p50, p80, peak, share))
        shown = "" if share is None else f", {100 * share:.0f}% of the floor"
        print(f"T={layer.tokens} {name}: {1e3 * p50:.3f} ms{shown}", flush=True)
    return results


def least_seconds(layer: "Layer", arguments: argparse.Namespace) -> float:
    """The floor of one pass: from measured rates, or on a CPU the passes themselves."""
    if layer.device.type == "cpu" and layer.heads == layer.kv_heads and not arguments.toy:
        from test_attention_entropy import floor as cpu_floor
        from timing import quantiles, seconds

        query, key = layer.inputs()
        return quantiles(seconds(lambda: cpu_floor(query, key), layer, arguments.seconds))[1]
    from roofline import floor, measured_rates

    rates = measured_rates(layer.device, layer.dtype, arguments.clock)
    found = floor(layer.tokens, layer.heads, layer.dim, rates)
    print(
        f"T={layer.tokens} floor of one pass: products {1e3 * found.products:.3f} ms at "
        f"{rates.products / 1e12:.2f} TFLOP/s, exponentials {1e3 * found.exponentials:.3f} ms"
    )
    return found.seconds


def write(layer: "Layer", arguments: argparse.Namespace) -> None:
    """Markdown tables with the machine above them, and two figures."""
    from tables import (
        Measurement,
        agreement_lines,
        environment,
        figure,
        ratio_lines,
        recorded,
        time_lines,
        tuning_lines,
    )

    measurements = [Measurement(**record) for record in kept(arguments, "results", [])]
    lines = [environment(layer) + ".", ""]
    lines += agreement_lines(kept(arguments, "agreement", None))
    if measurements:
        lines += ratio_lines(measurements) + time_lines(measurements)
        figure(measurements, "p50", "seconds", arguments.output / "times.png")
    if any(m.peak_bytes is not None for m in measurements):
        figure(measurements, "peak_bytes", "bytes", arguments.output / "memory.png")
    lines += tuning_lines(kept(arguments, "tuning", []))
    (arguments.output / "results.md").write_text("\n".join(lines))
    if arguments.record is not None:
        arguments.record.write_text(recorded(arguments.record.read_text(), lines))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
