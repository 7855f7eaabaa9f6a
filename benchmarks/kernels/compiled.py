"""Registers, local memory and shared memory of the compiled Triton kernels; needs no GPU.

`python benchmarks/kernels/compiled.py --arch 90` compiles what the library ships for that compute
capability and prints one line per kernel; `--json` prints it for machines. `--sweep` tries other
tiles as well. A configuration is fit if it spills nothing (stack and local memory are zero) and its
shared memory is within the limit of the device.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenweights.attention import triton_kernels
from tokenweights.attention.triton_configuration import Configuration, Tiles, block_dim, shipped

# Bytes of shared memory that a block may use.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
POINTERS = {
    "query": "input",
    "key": "input",
    "lse": "*fp32",
    "sinks": "*fp32",
    "sums": "*fp32",
    "workspace": "*fp32",
    "rests": "*fp32",
    "entropy": "*fp32",
    "sizes": "*i32",
    "sequences": "*i32",
    "items": "*i32",
}
# Multiples of 16 in every layout in use, which is what a launch would find out.
DIVISIBLE = {"query_batch", "query_head", "query_token", "key_batch", "key_head", "key_token"}
# What a launch may find to be a multiple of 16, as with 16384 tokens, or to be 1.
ROUND = frozenset({"query_slots", "all_rows", "sum_rows"})
ONES = ROUND | {"group", "window", "fixed_k", "local_window", "top_k"}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
EVERYTHING = {"ENTROPY": True, "LINEAR": True, "FIXED": True}
ENTROPY_ONLY = {"ENTROPY": True, "LINEAR": False, "FIXED": False}


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time choices."""

    kernel: str
    constants: dict[str, int | bool]
    dtype: str = "bf16"
    warps: int = 4
    stages: int = 1
    note: str = ""
    # A launch compiles anew for numbers that are 1, and for those that are multiples of 16.
    ones: frozenset[str] = frozenset()
    multiples: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Usage:
    """What the binary takes."""

    registers: int
    stack: int
    local: int
    shared: int

    def fits(self, arch: int) -> bool:
        """No local memory, and no more shared memory than the device has."""
        return self.stack == 0 and self.local == 0 and self.shared <= SHARED_LIMIT[arch]


def usage(case: Case, arch: int) -> Usage:
    """The resources of one kernel, read from its binary."""
    kernel = getattr(triton_kernels, case.kernel)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in case.constants or name in case.ones:
            signature[name] = "constexpr"
            constants[(index,)] = case.constants.get(name, 1)
        elif name in ("query", "key"):
            signature[name] = _input_type(name, case)
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, "i32")
        if signature[name].startswith("*") or name in DIVISIBLE | case.multiples:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Usage(*_resources(binary.asm["cubin"]), binary.metadata.shared)


def shipped_cases(arch: int) -> Iterator[Case]:
    """All kernels in the configurations that the library uses on this compute capability."""
    for dim, dtype in ((64, "bf16"), (96, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32")):
        yield from cases(shipped(arch // 10, block_dim(dim), _BYTES[dtype]), dim, dtype)
    usual = list(cases(shipped(arch // 10, 128, 2), 128, "bf16"))
    for flag in ("WINDOW", "SOFTCAP"):
        for case in usual:
            constants = case.constants | {flag: True}
            yield replace(case, constants=constants, note=f"{case.note} {flag.lower()}")
    for case in usual:
        yield replace(case, multiples=ROUND, note=f"{case.note} round")
        yield replace(case, ones=ONES, note=f"{case.note} ones")
    # Tensors that descriptors cannot address; where there are none, nothing new.
    configuration = shipped(arch // 10, 128, 2, describable=False)
    if configuration != shipped(arch // 10, 128, 2):
        yield from cases(configuration, 128, "bf16")
    for width in (16, 512, 4096, 8192, 16384, 131072):
        yield selection_case(configuration, width)
    yield replace(selection_case(configuration, 4096), ones=ONES, note="keys=4096 ones")
    yield replace(selection_case(configuration, 4096), multiples=ROUND, note="keys=4096 round")


def cases(configuration: Configuration, dim: int, dtype: str) -> Iterator[Case]:
    """Log-sum-exp, entropy alone, all sums, and all sums with a workspace."""
    common = {
        "DIM": dim,
        "BLOCK_DIM": block_dim(dim),
        "CAUSAL": True,
        "WINDOW": False,
        "SOFTCAP": False,
        "DESCRIPTORS": configuration.descriptors,
        "UPCAST": False,
    }
    tiles = configuration.denominators
    yield Case(
        "log_sum_exp",
        common | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys, "SINKS": False},
        dtype,
        tiles.warps,
        tiles.stages,
        f"D={dim} {dtype} {_shown(tiles)}",
    )
    for name, tiles, sums, store in (
        ("entropy", configuration.weights, ENTROPY_ONLY, False),
        ("sums", configuration.sums, EVERYTHING, False),
        ("sums+workspace", configuration.sums, EVERYTHING, True),
    ):
        constants = common | sums | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
        constants |= {"HEADS": 32, "UNROLLED": 4 if configuration.unrolled else 1, "STORE": store}
        note = f"{name} D={dim} {dtype} {_shown(tiles)}"
        yield Case("mean_weights", constants, dtype, tiles.warps, tiles.stages, note)


def selection_case(configuration: Configuration, width: int) -> Case:
    """Top-k and four support sizes of rows of this width."""
    chosen = configuration.selection(width, 64)
    constants = {"TARGETS": 5, "SLOTS": 8, "TOP_K": True, "CAUSAL": True, "WINDOW": False}
    constants |= {"ROWS": chosen.rows, "BLOCK": chosen.block, "PIECES": chosen.pieces}
    note = f"keys={width} {chosen.rows}x{chosen.block} {chosen.warps}w"
    return Case("selections", constants, warps=chosen.warps, note=note)


def sweep_cases(arch: int) -> Iterator[Case]:
    """Other types and dimensions in shipped tiles, and tiles worth a try on a device."""
    for dim, dtype in itertools.product((64, 96, 128, 256), ("fp16", "fp32")):
        yield from cases(shipped(arch // 10, block_dim(dim), _BYTES[dtype]), dim, dtype)
    shapes = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8)]
    shapes += [(128, 64, 8), (128, 128, 8), (64, 64, 8), (64, 128, 8)]
    base = shipped(arch // 10, 128, 2)
    for (rows, keys, warps), stages, dim in itertools.product(shapes, (1, 2, 3), (64, 128)):
        tiles = Tiles(rows, keys, warps, stages)
        for unrolled in (False, True):
            yield from cases(
                replace(base, weights=tiles, sums=tiles, denominators=tiles, unrolled=unrolled),
                dim,
                "bf16",
            )


def _input_type(name: str, case: Case) -> str:
    if not case.constants["DESCRIPTORS"]:
        return f"*{case.dtype}"
    rows = case.constants["BLOCK_ROWS" if name == "query" else "BLOCK_KEYS"]
    return f"tensordesc<{case.dtype}[1,1,{rows},{case.constants['BLOCK_DIM']}]>"


def _shown(tiles: Tiles) -> str:
    return f"{tiles.rows}x{tiles.keys} {tiles.warps}w s{tiles.stages}"


def _resources(binary: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [re.search(rf"\b{name}:(\d+)", shown) for name in ("REG", "STACK", "LOCAL")]
    registers, stack, local = (int(match.group(1)) for match in found if match)
    return registers, stack, local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), nargs="+", default=[90])
    parser.add_argument("--sweep", action="store_true", help="other tiles as well")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for arch in arguments.arch:
        for case in (sweep_cases if arguments.sweep else shipped_cases)(arch):
            taken = usage(case, arch)
            record = {"arch": arch, "kernel": case.kernel, "note": case.note}
            rows.append(record | asdict(taken) | {"fits": taken.fits(arch)})
            if not arguments.json:
                shown = f"{taken.registers:4} reg {taken.stack:5} stack {taken.shared:7} shared"
                verdict = "fits" if taken.fits(arch) else "DOES NOT FIT"
                print(f"sm_{arch} {case.kernel:13}{case.note:50}{shown}  {verdict}", flush=True)
    if arguments.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
