"""What the compiled kernel of attention received takes, as `compiled.py` reads it; needs no GPU.

`python benchmarks/kernels/compiled_columns.py --arch 80 90 100` prints one line per case, `--json`
a list for machines.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import compiled
from compiled import Case, usage

from tokenweights.attention import triton_columns
from tokenweights.attention.triton_configuration import block_dim, shipped
from tokenweights.attention.triton_received import column_tiles

BYTES = {"bf16": 2, "fp32": 4}
ROUND = frozenset({"query_slots", "all_rows", "key_slots", "all_keys"})
ONES = ROUND | {"group", "window", "first", "last", "out_heads"}


def cases(arch: int) -> Iterator[Case]:
    """The kernel in the configurations that the library uses on this compute capability."""
    for dim, dtype in ((64, "bf16"), (96, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32")):
        for describable in (True, False):
            yield _case(arch, dim, dtype, describable)
    usual = _case(arch, 128, "bf16", True)
    for flag in ("WINDOW", "SOFTCAP", "ASKED", "LARGEST"):
        yield replace(usual, constants=usual.constants | {flag: True}, note=f"{usual.note} {flag}")
    yield replace(usual, multiples=ROUND, note=f"{usual.note} round")
    yield replace(usual, ones=ONES, note=f"{usual.note} ones")


def _case(arch: int, dim: int, dtype: str, describable: bool) -> Case:
    configuration = shipped(arch // 10, block_dim(dim), BYTES[dtype], describable=describable)
    tiles = column_tiles(configuration, BYTES[dtype])
    constants = {
        "HEADS": 32,
        "DIM": dim,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KEYS": tiles.keys,
        "BLOCK_DIM": block_dim(dim),
        "CAUSAL": True,
        "WINDOW": False,
        "SOFTCAP": False,
        "ASKED": False,
        "FIRST": True,
        "LAST": True,
        "LARGEST": False,
        "DESCRIPTORS": configuration.descriptors,
        "UPCAST": False,
    }
    note = f"D={dim} {dtype} {tiles}" + ", descriptors" * configuration.descriptors
    return Case("key_columns", constants, dtype, tiles.warps, tiles.stages, note)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # `usage` looks a kernel up by its name among those of one file.
    compiled.triton_kernels = triton_columns
    compiled.POINTERS |= {"asked": "*i8", "totals": "*fp32"}
    records = []
    for arch, case in itertools.chain.from_iterable(
        ((arch, case) for case in cases(arch)) for arch in options.arch
    ):
        found = usage(case, arch)
        records.append({"arch": arch, "note": case.note, "fits": found.fits(arch)} | asdict(found))
        if not options.json:
            print(records[-1])
    if options.json:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
