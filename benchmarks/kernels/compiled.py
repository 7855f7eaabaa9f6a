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

from tokenweights.attention import triton_kernels
from tokenweights.attention.triton_configuration import Configuration, Tiles, block_dim, shipped

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
}
# Multiples of 16 in every layout in use, which is what a launch would find out.
DIVISIBLE = {"query_batch", "query_head", "query_token", "key_batch", "key_head", "key_token"}
# What a launch may find to be a multiple of 16, as with 16384 tokens, or to be 1.
ROUND = frozenset({"query_slots", "all_rows", "sum_rows"})
ONES = ROUND | {"group", "window", "fixed_k", "local_window", "distance_bound", "top_k"}
PRODUCT = re.compile(r"\b(?P<name>HGMMA|HMMA|UTC\w*MMA)\b(?:\.64x(?P<columns>\d+)x16)?")
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
    """What the binary takes.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread in local memory.
        local: The same, as the binary declares them.
        shared: Bytes of a block.
        blocks: How many blocks a multiprocessor holds.
        product: The tensor-core instruction; empty where there is none.
        per_score: Instructions that threads issue for a score; None without such an instruction.
    """

    registers: int
    stack: int
    local: int
    shared: int
    blocks: int
    product: str
    per_score: float | None

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
    registers, stack, local = _resources(_shown_by("cuobjdump", "--dump-resource-usage", binary))
    code = _shown_by("nvdisasm", "-c", binary)
    shared = binary.metadata.shared
    blocks = _blocks(registers, shared, 32 * case.warps, arch)
    return Usage(registers, stack, local, shared, blocks, *_tightest_loop(code, case))


def shipped_cases(arch: int) -> Iterator[Case]:
    """All kernels in the configurations that the library uses on this compute capability."""
    yield from usual_cases(arch)
    for dim, dtype in ((64, "bf16"), (96, "bf16"), (256, "bf16"), (128, "fp32")):
        yield from cases(shipped(arch // 10, block_dim(dim), _BYTES[dtype]), dim, dtype)
    usual = list(cases(shipped(arch // 10, 128, 2), 128, "bf16"))
    for case in usual:
        yield replace(case, multiples=ROUND, note=f"{case.note} round")
        yield replace(case, ones=ONES, note=f"{case.note} ones")
    configuration = shipped(arch // 10, 128, 2)
    for width in (16, 512, 4096, 8192, 16384, 131072):
        yield selection_case(configuration, width)
    yield replace(selection_case(configuration, 4096), ones=ONES, note="keys=4096 ones")
    yield replace(selection_case(configuration, 4096), multiples=ROUND, note="keys=4096 round")


def usual_cases(arch: int) -> Iterator[Case]:
    """Those of 128 dimensions in half precision, with every kind of logits, heads and address."""
    usual = list(cases(shipped(arch // 10, 128, 2), 128, "bf16"))
    yield from usual
    capped = list(cases(shipped(arch // 10, 128, 2, softcap=True), 128, "bf16"))
    for flags, some in (
        (["WINDOW"], usual),
        (["SOFTCAP"], capped),
        (["WINDOW", "SOFTCAP"], capped),
    ):
        for case in some:
            if len(flags) > 1 and not case.note.startswith("entropy"):
                continue
            constants = case.constants | dict.fromkeys(flags, True)
            note = " ".join([case.note, *map(str.lower, flags)])
            yield replace(case, constants=constants, note=note)
    # Every head by itself, and heads that have keys of their own: nothing to share.
    for case in usual:
        for heads, note in ((1, "heads apart"), (32, "own keys")):
            if case.constants.get("SHARED", 1) > 1:
                constants = case.constants | {"HEADS": heads, "SHARED": 1}
                yield replace(case, constants=constants, note=f"{case.note} {note}")
    # Tensors that descriptors cannot address; where there are none, nothing new.
    for softcap in (False, True):
        pointers = shipped(arch // 10, 128, 2, describable=False, softcap=softcap)
        if pointers != shipped(arch // 10, 128, 2, softcap=softcap):
            for case in cases(pointers, 128, "bf16"):
                constants, note = case.constants | {"SOFTCAP": softcap}, f"{case.note} pointers"
                yield replace(case, constants=constants, note=note + " softcap" * softcap)


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
        common
        | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
        | {"SINKS": False, "NEGATIVE": False},
        dtype,
        tiles.warps,
        tiles.stages,
        f"D={dim} {dtype} {tiles}",
    )
    for name, tiles, sums, store in (
        ("entropy", configuration.weights, ENTROPY_ONLY, False),
        ("sums", configuration.sums, EVERYTHING, False),
        ("sums+workspace", configuration.sums, EVERYTHING, True),
    ):
        constants = common | sums | {"BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
        constants |= {"HEADS": 32, "SHARED": 4 if tiles.shared else 1, "STORE": store}
        constants |= {"OVERLAPPED": tiles.overlapped}
        note = f"{name} D={dim} {dtype} {tiles}"
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
    forms = ({}, {"shared": True}, {"overlapped": True}, {"shared": True, "overlapped": True})
    for (rows, keys, warps), stages, dim in itertools.product(shapes, (1, 2, 3), (64, 128)):
        for form in forms:
            tiles = Tiles(rows, keys, warps, stages, **form)
            some = replace(base, weights=tiles, sums=tiles, denominators=tiles)
            yield from itertools.islice(cases(some, dim, "bf16"), 1 if form else 0, None)


def _input_type(name: str, case: Case) -> str:
    if not case.constants["DESCRIPTORS"]:
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


def _tightest_loop(code: str, case: Case) -> tuple[str, float | None]:
    """The product in it, and instructions per score."""
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
            found.append(((end + 1 - start) / each, within[0]["name"]))
    if not found:
        return "", None
    least, name = min(found)
    return name, round(least, 2)


def _scores(product: re.Match[str], case: Case) -> float:
    """Of a thread: a warp group multiplies 64 x N x 16 at a time, a warp 16 x 8 x 16."""
    warp_group = product["name"] == "HGMMA"
    both = 64 * int(product["columns"] or 0) / 128 if warp_group else 16 * 8 / 32
    return both * 16 / case.constants["BLOCK_DIM"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), nargs="+", default=[90])
    parser.add_argument("--usual", action="store_true", help="128 dimensions in bfloat16 alone")
    parser.add_argument("--sweep", action="store_true", help="other tiles as well")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = shipped_cases
    if arguments.sweep or arguments.usual:
        chosen = sweep_cases if arguments.sweep else usual_cases
    rows = []
    for arch in arguments.arch:
        for case in chosen(arch):
            taken = usage(case, arch)
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
                verdict = "fits" if taken.fits(arch) else "DOES NOT FIT"
                print(f"sm_{arch} {case.kernel:13}{case.note:50}{shown}  {verdict}", flush=True)
    if arguments.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
