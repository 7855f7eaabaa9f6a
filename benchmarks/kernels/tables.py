"""What the report writes: tables in Markdown, and figures."""

import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layer import Layer

# The part of a results file that the report replaces lies between these lines.
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
OURS, COMPUTED = "entropy, lse given", "entropy"
EVERYTHING = "all statistics, lse given"
FORWARDS = ("attention forward, SDPA flash", "attention forward, SDPA")


@dataclass(frozen=True)
class Measurement:
    """Seconds at the 20th, 50th and 80th percentile, and bytes beyond the inputs.

    `p50` is None where the contender cannot run, for the reason in `missing`.
    """

    name: str
    tokens: int
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    peak_bytes: int | None = None
    of_floor: float | None = None
    missing: str = ""


def environment(layer: "Layer") -> str:
    """Machine, versions and layer."""
    import torch

    from conftest import processor

    device = processor() + ", one thread"
    if layer.device.type == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    for package in ("triton", "flash_attn"):
        if importlib.util.find_spec(package):
            versions += f", {package} {importlib.import_module(package).__version__}"
    heads = f"H={layer.heads}, Hkv={layer.kv_heads}, D={layer.dim}"
    return f"{device}; {versions}; B=1, {heads}, {str(layer.dtype).removeprefix('torch.')}"


def agreement_lines(counts: dict[str, int] | None) -> list[str]:
    """How many of the kernels' cases hold."""
    if counts is None:
        return []
    return [
        f"Cases of the kernels against the float64 reference on this device: {counts['passed']} "
        f"passed, {counts['failed']} failed, {counts['skipped']} skipped.",
        "",
    ]


def time_lines(measurements: list[Measurement]) -> list[str]:
    """Every contender at every length."""
    lines = ["| tokens | what | p20 ms | p50 ms | p80 ms | peak MiB | of the floor |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for m in measurements:
        if m.p50 is None:
            lines.append(f"| {m.tokens} | {m.name} | {m.missing} | | | | |")
            continue
        peak = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.0f}"
        share = "" if m.of_floor is None else f"{100 * m.of_floor:.0f} %"
        times = " | ".join(f"{1e3 * value:.3f}" for value in (m.p20, m.p50, m.p80) if value)
        lines.append(f"| {m.tokens} | {m.name} | {times} | {peak} | {share} |")
    return [*lines, ""]


def ratio_lines(measurements: list[Measurement]) -> list[str]:
    """The numbers that the kernels are judged by, one row per length, medians of this run."""
    lines = [
        "| tokens | entropy / attention forward | the same, lse computed | share of the floor |"
    ]
    lines[0] += " all statistics / entropy | peak MiB, entropy | peak MiB, all statistics |"
    lines.append("|---:|---:|---:|---:|---:|---:|---:|")
    for tokens in dict.fromkeys(m.tokens for m in measurements):
        at = {m.name: m for m in measurements if m.tokens == tokens and m.p50}
        ours, everything = at.get(OURS), at.get(EVERYTHING)
        forward = next((at[name] for name in FORWARDS if name in at), None)
        cells = [
            _ratio(ours, forward),
            _ratio(at.get(COMPUTED), forward),
            "" if ours is None or ours.of_floor is None else f"{100 * ours.of_floor:.0f} %",
            _ratio(everything, ours),
            *(
                "" if m is None or m.peak_bytes is None else f"{m.peak_bytes / 2**20:.0f}"
                for m in (ours, everything)
            ),
        ]
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def tuning_lines(records: list[dict]) -> list[str]:
    """Every choice of tiles, the fastest of each role marked."""
    if not records:
        return []
    lines = ["| used for | tiles | ms |", "|---|---|---:|"]
    best = {
        role: min((r["ms"] for r in records if r["role"] == role and r["ms"]), default=None)
        for role in dict.fromkeys(r["role"] for r in records)
    }
    for record in records:
        time = record["reason"] if record["ms"] is None else f"{record['ms']:.3f}"
        mark = " (fastest)" if record["ms"] and record["ms"] == best[record["role"]] else ""
        lines.append(f"| {record['role']} | {record['tiles']} | {time}{mark} |")
    return [*lines, ""]


def recorded(text: str, lines: list[str]) -> str:
    """A results file with the part between its two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"no place for a report: the lines {BEGIN} and {END} are missing")
    return "\n".join([before + BEGIN, "", *lines, END]) + after


def figure(measurements: list[Measurement], field: str, label: str, path: Path) -> None:
    """Times or memory over the number of tokens, our lines solid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(m.name for m in measurements):
        points = [m for m in measurements if m.name == name and getattr(m, field)]
        if not points:
            continue
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


def _ratio(top: Measurement | None, bottom: Measurement | None) -> str:
    if top is None or bottom is None or not top.p50 or not bottom.p50:
        return ""
    return f"{top.p50 / bottom.p50:.2f}"
