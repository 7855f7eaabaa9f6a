"""Every kernel, type and layout against the float64 reference."""

from step import Parts, Run, kernels_run

# Of tests/attention/triton_cases.py, as pytest's `-k`, so that a short run keeps what it found.
GROUPS = ("types", "ways and not types", "logits and not types and not ways")
REST = "not types and not ways and not logits"


def parts(run: Run) -> Parts:
    """Passed, failed and skipped test cases, by group."""
    if run.toy:
        return {"nothing_asked": lambda: cases(run, "nothing_asked")}
    return {group: lambda group=group: cases(run, group) for group in (*GROUPS, REST)}


def cases(run: Run, only: str) -> dict[str, int]:
    """Counts of one group; a wrong kernel is an error."""
    from agreement import kernel_cases

    kernels_run(run)
    counts = kernel_cases(run.device.type, only=only)
    if counts["failed"] or not counts["passed"]:
        raise AssertionError(f"kernels disagree with the reference: {counts}")
    return counts
