"""What the compiled Triton kernels take, read from their machine code; needs no GPU.

`python benchmarks/kernels/compiled.py --arch 90` compiles what the library ships for that compute
capability and prints one line per kernel; `--json` prints it for machines. `--sweep` tries other
tiles as well. A configuration is fit if it spills nothing (stack and local memory are zero) and its
shared memory is within the limit of the device. Instructions per score are those of the tightest
loop with a product in it: what is done once for all heads of a tile is outside of it.
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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenweights.attention import triton_columns, triton_kernels
from tokenweights.attention.triton_configuration import Configuration, Tiles, block_dim, shipped
from tokenweights.attention.triton_received import column_tiles

KERNELS = {
    "log_sum_exp": triton_kernels.log_sum_exp,
    "mean_weights": triton_kernels.mean_weights,
    "selections": triton_kernels.selections,
    "key_columns": triton_columns.key_columns,
}
# Bytes of shared memory that a block may use.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
SHARED_OF_MULTIPROCESSOR = {80: 167936, 90: 233472, 100: 233472}
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
    "asked": "*i8",
    "totals": "*fp32",
}
# What a launch may find to be a multiple of 16, as with 16384 tokens, or to be 1.
ROUND = frozenset({"query_slots", "all_rows", "sum_rows", "key_slots", "all_keys"})
ONES = ROUND | {"group", "window", "fixed_k", "local_window", "distance_bound", "top_k"}
ONES |= {"first", "last", "out_heads"}
# In the assembler's language, and in the machine's.
PRODUCTS = {"wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "mma.sync": "HMMA"}
PRODUCT = re.compile(r"\b(?P<name>HGMMA|HMMA|UTC\w*MMA)\b(?:\.64x(?P<columns>\d+)x16)?")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Wide heads and exact products, whose tiles are others, in their plain and their dearest form:
# dimension, type, softcap, and whether descriptors can address the tensors.
EDGES = (
    (256, "bf16", False, True),
    (256, "bf16", True, False),
    (128, "fp32", False, True),
    (128, "fp32", True, False),
)


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time choices."""

    kernel: str
    constants: dict[str, int | bool]
    dtype: str = "bf16"
    warps: int = 4
    stages: int = 1
    note: str = ""
    # A launch compiles anew for what is None, for numbers that are 1, and for multiples of 16.
    absent: frozenset[str] = frozenset()
    ones: frozenset[str] = frozenset()
    multiples: frozenset[str] = frozenset()
    # Whether its loop is to be read, which takes as long as compiling it.
    read: bool = False


@dataclass(frozen=True)
class Usage:
    """What the binary takes.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread in local memory.
        local: The same, as the binary declares them.
        shared: Bytes of a block.
        blocks: How many blocks a multiprocessor holds.
        product: The tensor-core instruction; empty where there is none.
        per_score: Instructions that threads issue for a score; None where no such loop was read.
        overlap: Share of the loop's exponentials that are issued between a product's start and the
            wait for it; None where no loop was read or no instruction waits (other than sm_90).
    """

    registers: int
    stack: int
    local: int
    shared: int
    blocks: int
    product: str
    per_score: float | None = None
    overlap: float | None = None

    def fits(self, arch: int) -> bool:
        """No local memory, and no more shared memory than the device has."""
        return self.stack == 0 and self.local == 0 and self.shared <= SHARED_LIMIT[arch]


def usage(case: Case, arch: int) -> Usage:
    """The resources of one kernel, read from its binary."""
    kernel = KERNELS[case.kernel]
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in case.absent:
            signature[name], constants[(index,)] = "constexpr", None
        elif name in case.constants or name in case.ones:
            signature[name] = "constexpr"
            constants[(index,)] = case.constants.get(name, 1)
        elif name in ("query_strides", "key_strides"):
            # Multiples of 16 in every layout in use, which is what a launch would find out.
            signature[name] = ("i32",) * 3
            attributes |= {(index, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif name in ("query", "key"):
            signature[name] = _input_type(name, case)
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, "i32")
        if str(signature[name]).startswith("*") or name in case.multiples:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, local = _resources(_shown_by("cuobjdump", "--dump-resource-usage", binary))
    shared = binary.metadata.shared
    blocks = _blocks(registers, shared, 32 * case.warps, arch)
    product = next((new for old, new in PRODUCTS.items() if old in binary.asm["ptx"]), "")
    found = Usage(registers, stack, local, shared, blocks, product)
    if case.read and product:
        code = _shown_by("nvdisasm", "-c", binary)
        name, per_score, overlap = _tightest_loop(code, case)
        found = replace(found, product=name, per_score=per_score, overlap=overlap)
    return found


def shipped_cases(arch: int) -> Iterator[Case]:
    """All kernels in the configurations that the library uses on this compute capability."""
    yield from usual_cases(arch)
    configuration = shipped(arch // 10, 128, 2)
    for dim in (64, 96):
        yield from list(cases(configuration, dim, "bf16"))[:3]
    for case in list(cases(configuration, 128, "bf16"))[:2]:
        yield replace(case, multiples=ROUND, note=f"{case.note} round")
        yield replace(case, ones=ONES, note=f"{case.note} ones")
    for width in (16, 512, 4096, 8192, 16384, 131072):
        yield selection_case(configuration, width)


def usual_cases(arch: int) -> Iterator[Case]:
    """Every kind of logits, heads and address; for wide heads and float32 the two extremes."""
    base = shipped(arch // 10, 128, 2)
    usual = list(cases(base, 128, "bf16"))
    yield from (replace(case, read=True) for case in usual)
    if arch == 90:
        yield replace(overlapped(arch), read=True)
    yield from (given(case, "window") for case in usual[:2])
    yield given(usual[2], "distance_bound")
    # Every head by itself, and heads that have keys of their own: nothing to share.
    if base.weights.shared:
        apart = list(cases(replace(base, weights=base.sums), 128, "bf16"))[1]
        for case, changes, note in (
            (usual[1], {"SHARED": 1}, "own keys"),
            (apart, {"HEADS": 1, "SHARED": 1}, "heads apart"),
        ):
            yield replace(case, constants=case.constants | changes, note=f"{case.note} {note}")
    seen = usual
    kinds = [(128, "bf16", False, False), (128, "bf16", True, True), (128, "bf16", True, False)]
    for dim, dtype, softcap, describable in (*kinds, *EDGES):
        chosen = shipped(arch // 10, dim, _BYTES[dtype], describable=describable, softcap=softcap)
        for case in list(cases(chosen, dim, dtype))[: 3 if dim == 128 and dtype == "bf16" else 2]:
            case = given(case, "softcap") if softcap else case
            if case not in seen:  # as where nothing is described, whatever can be
                seen.append(case)
                yield case


def overlapped(arch: int) -> Case:
    """The entropy in the form that tuning tries where products run beside exponentials."""
    base = shipped(arch // 10, 128, 2)
    tiles = replace(base.weights, shared=False, overlapped=True)
    return list(cases(replace(base, weights=tiles), 128, "bf16"))[1]


def given(case: Case, name: str) -> Case:
    """The same kernel, with a number that it was compiled without."""
    return replace(case, absent=case.absent - {name}, note=f"{case.note} {name}")


def cases(configuration: Configuration, dim: int, dtype: str) -> Iterator[Case]:
    """Log-sum-exp, entropy alone, all sums, and all sums with a workspace."""
    common = {"DIM": dim, "BLOCK_DIM": block_dim(dim), "CAUSAL": True}
    # Descriptors know the strides.
    absent = frozenset({"softcap", "window", "sinks", "distance_bound"})
    absent |= {"query_strides", "key_strides"} if configuration.descriptors else set()
    address = " pointers" * (not configuration.descriptors)
    tiles = configuration.denominators
    yield Case(
        "log_sum_exp",
        common | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys},
        dtype,
        tiles.warps,
        tiles.stages,
        f"D={dim} {dtype} {tiles}{address}",
        absent,
    )
    for name, tiles, missing in (
        ("entropy", configuration.weights, {"workspace", "fixed_k", "local_window"}),
        ("sums", configuration.sums, {"workspace"}),
        ("sums+workspace", configuration.sums, set()),
    ):
        constants = common | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
        constants |= {"HEADS": 32, "SHARED": 4 if tiles.shared else 1}
        constants |= {"OVERLAPPED": tiles.overlapped}
        note = f"{name} D={dim} {dtype} {tiles}{address}"
        yield Case(
            "mean_weights", constants, dtype, tiles.warps, tiles.stages, note, absent | missing
        )


def column_cases(arch: int) -> Iterator[Case]:
    """The kernel of attention received, alike."""
    kinds = [(128, "bf16", False, True), (128, "bf16", True, False)]
    seen: list[Case] = []
    for dim, dtype, softcap, describable in (*kinds, *EDGES):
        chosen = shipped(arch // 10, dim, _BYTES[dtype], describable=describable)
        case = _columns(chosen, dim, dtype)
        case = given(case, "softcap") if softcap else case
        if case not in seen:
            seen.append(case)
            yield case
    usual = seen[0]
    yield given(usual, "window")
    yield replace(usual, constants=usual.constants | {"LARGEST": True}, note=f"{usual.note} max")
    yield replace(usual, absent=usual.absent | {"first", "last"}, note=f"{usual.note} no horizon")


def _columns(configuration: Configuration, dim: int, dtype: str) -> Case:
    tiles = column_tiles(configuration, _BYTES[dtype])
    constants = {"DIM": dim, "BLOCK_DIM": block_dim(dim), "CAUSAL": True, "LARGEST": False}
    constants |= {"HEADS": 32, "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
    absent = frozenset({"softcap", "window", "asked"})
    absent |= {"query_strides", "key_strides"} if configuration.descriptors else set()
    note = f"D={dim} {dtype} {tiles}" + " pointers" * (not configuration.descriptors)
    return Case("key_columns", constants, dtype, tiles.warps, tiles.stages, note, absent)


def selection_case(configuration: Configuration, width: int) -> Case:
    """Top-k and four support sizes of rows of this width."""
    chosen = configuration.selection(width, 64)
    constants = {"TARGETS": 5, "SLOTS": 8, "CAUSAL": True}
    constants |= {"ROWS": chosen.rows, "BLOCK": chosen.block, "PIECES": chosen.pieces}
    note = f"keys={width} {chosen.rows}x{chosen.block} {chosen.warps}w"
    return Case(
        "selections", constants, warps=chosen.warps, note=note, absent=frozenset({"window"})
    )


def sweep_cases(arch: int) -> Iterator[Case]:
    """Other types and dimensions in shipped tiles, and tiles worth a try on a device."""
    for dim, dtype in itertools.product((64, 96, 128, 256), ("fp16", "fp32")):
        yield from cases(shipped(arch // 10, block_dim(dim), _BYTES[dtype]), dim, dtype)
    shapes = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8)]
    shapes += [(128, 64, 8), (128, 128, 8), (64, 64, 8), (64, 128, 8)]
    base = shipped(arch // 10, 128, 2)
    forms = ({}, {"shared": True}, {"overlapped": True})
    for (rows, keys, warps), stages, dim in itertools.product(shapes, (1, 2, 3), (64, 128)):
        for form in forms:
            tiles = Tiles(rows, keys, warps, stages, **form)
            some = replace(base, weights=tiles, sums=tiles, denominators=tiles)
            yield from itertools.islice(cases(some, dim, "bf16"), 1 if form else 0, None)


def _input_type(name: str, case: Case) -> str:
    if f"{name}_strides" not in case.absent:
        return f"*{case.dtype}"
    rows = case.constants["BLOCK_ROWS" if name == "query" else "BLOCK_KEYS"]
    return f"tensordesc<{case.dtype}[1,1,{rows},{case.constants['BLOCK_DIM']}]>"


def _shown_by(tool: str, option: str, binary: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(shown: str) -> tuple[int, int, int]:
    found = [re.search(rf"\b{name}:(\d+)", shown) for name in ("REG", "STACK", "LOCAL")]
    registers, stack, local = (int(match.group(1)) for match in found if match)
    return registers, stack, local


def _blocks(registers: int, shared: int, threads: int, arch: int) -> int:
    """Registers are given out by eight for each thread, shared memory with 1 KiB for each block."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED_OF_MULTIPROCESSOR[arch] // (shared + 1024), 2048 // threads)


def _tightest_loop(code: str, case: Case) -> tuple[str, float | None, float | None]:
    """The product in it, instructions per score, and the share of exponentials under products."""
    lines, places = [], {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            places[label.group(1)] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction.group(1))
    products = [(place, p) for place, x in enumerate(lines) if (p := PRODUCT.search(x))]
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*\((\.L_\w+)\)", line)
        start = places.get(target.group(1), end + 1) if target else end + 1
        within = [product for place, product in products if start <= place <= end]
        if within:
            each = sum(_scores(product, case) for product in within)
            # On sm_100 one thread starts the product of the whole tile.
            if within[0]["name"] not in ("HGMMA", "HMMA"):
                whole = case.constants["BLOCK_ROWS"] * case.constants["BLOCK_KEYS"]
                each = whole / (32 * case.warps)
            found.append(((end + 1 - start) / each, within[0]["name"], start, end + 1))
    if not found:
        return "", None, None
    least, name, start, stop = min(found)
    return name, round(least, 2), _overlap(lines[start:stop]) if name == "HGMMA" else None


def _overlap(loop: list[str]) -> float:
    """Share of the exponentials that stand between a product and the wait for it."""
    running, under, all_of_them = False, 0, 0
    for line in loop:
        running = (running or "HGMMA" in line) and "WARPGROUP.DEPBAR" not in line
        if "MUFU.EX2" in line:
            all_of_them, under = all_of_them + 1, under + running
    return round(under / max(all_of_them, 1), 2)


def _scores(product: re.Match[str], case: Case) -> float:
    """Of a thread: a warp group multiplies 64 x N x 16 at a time, a warp 16 x 8 x 16."""
    warp_group = product["name"] == "HGMMA"
    both = 64 * int(product["columns"] or 0) / 128 if warp_group else 16 * 8 / 32
    return both * 16 / case.constants["BLOCK_DIM"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), nargs="+", default=[90])
    parser.add_argument("--usual", action="store_true", help="without narrow heads and selections")
    parser.add_argument("--columns", action="store_true", help="attention received alone")
    parser.add_argument("--sweep", action="store_true", help="other tiles as well")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = shipped_cases
    for asked, some in (
        (arguments.usual, usual_cases),
        (arguments.columns, column_cases),
        (arguments.sweep, sweep_cases),
    ):
        chosen = some if asked else chosen
    rows = []
    for arch in arguments.arch:
        for case in chosen(arch):
            taken = usage(case if arguments.json else replace(case, read=True), arch)
            record = {
                "triton": triton.__version__,
                "arch": arch,
                "kernel": case.kernel,
                "note": case.note,
            }
            rows.append(record | asdict(taken) | {"fits": taken.fits(arch)})
            if not arguments.json:
                shown = f"{taken.registers:4} reg {taken.stack:5} stack {taken.shared:7} shared"
                shown += f" {taken.blocks} blocks {taken.product:7}"
                shown += f" {taken.per_score:5.2f} per score" if taken.per_score else ""
                shown += f" {taken.overlap:4.2f} overlap" if taken.overlap else ""
                verdict = "fits" if taken.fits(arch) else "DOES NOT FIT"
                print(f"sm_{arch} {case.kernel:13}{case.note:50}{shown}  {verdict}", flush=True)
    if arguments.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
