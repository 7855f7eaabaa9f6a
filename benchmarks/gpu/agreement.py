"""Every kernel, type and layout against the float64 reference."""

from step import Parts, Run, kernels_run

# Of tests/attention/triton_cases.py, as pytest's `-k`, so that a short run keeps what it found.
GROUPS = ("types", "ways and not types", "logits and not types and not ways")
REST = "not types and not ways and not logits"
RECEIVED = "triton_received_cases.py"


def parts(run: Run) -> Parts:
    """Passed, failed and skipped test cases, by group."""
    if run.toy:
        return {
            "nothing_asked": lambda: cases(run, "nothing_asked"),
            "received": lambda: cases(run, "packed", RECEIVED),
        }
    found = {group: lambda group=group: cases(run, group) for group in (*GROUPS, REST)}
    return found | {"received": lambda: cases(run, None, RECEIVED)}


def cases(run: Run, only: str | None, file: str = "triton_cases.py") -> dict[str, int]:
    """Counts of one group; a wrong kernel is an error."""
    from agreement import kernel_cases

    kernels_run(run)
    counts = kernel_cases(run.device.type, only=only, file=file)
    if counts["failed"] or not counts["passed"]:
        raise AssertionError(f"kernels disagree with the reference: {counts}")
    return counts
