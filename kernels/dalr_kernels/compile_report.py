"""Compile every shipped kernel ahead of time and tabulate what it needs. No GPU is used.

    python -m dalr_kernels.compile_report            # all, to kernels/bench/compile_report.md
    python -m dalr_kernels.compile_report --quick    # the few of `make test`, to the screen

Triton does not refuse kernels that need too much shared memory, and spilled registers only cost
time, so both are read from the binary: registers and stack from its resource table, local loads
and stores inside loops from its disassembly.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from dalr_kernels.fused.tuning import HARD, PLAIN, SOFT

if TYPE_CHECKING:
    from dalr_kernels.fused.arguments import Flags, TileShape

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
STACK_LIMIT = 16
REPORT = Path(__file__).parents[1] / "bench" / "compile_report.md"
NOTE = """Written by `python -m dalr_kernels.compile_report`; no GPU is involved. Shared memory and
stack in bytes; spills are local loads and stores inside loops.

"""
DTYPES = {torch.float16: "fp16", torch.float32: "fp32"}


# Types of parameters as Triton writes them, by name.
Signature = dict[str, str | tuple[str, ...]]


class Kernel(Protocol):
    """What the report needs of a `triton.JITFunction`."""

    __name__: str
    arg_names: list[str]


class Terms(NamedTuple):
    """Compile-time choices of one objective; see `Flags` for the fields after the name."""

    name: str
    nce: bool = False
    kl: bool = False
    list_net: bool = False
    nce_shift: int = PLAIN
    kl_shift: int = PLAIN
    list_net_shift: int = PLAIN
    ids: bool = False
    mask: bool = False
    online: bool = False

    def flags(self) -> Flags:
        """As `call.kernel_flags` gives them."""
        from triton.language import constexpr

        from dalr_kernels.fused.arguments import Flags

        values = self._asdict() | {
            "clamp": False,
            "polynomial": True,
            "one_teacher": self.kl and self.list_net,
            "teacher_labels": self.kl and self.nce_shift == SOFT,
        }
        return Flags(**{name: constexpr(values[name]) for name in Flags._fields})


# What the presets and the benchmark run, and the online forms.
OBJECTIVES = (
    Terms("InfoNCE", nce=True),
    Terms("InfoNCE, margin, ids", nce=True, nce_shift=HARD, ids=True),
    Terms("InfoNCE, soft margin, ids", nce=True, nce_shift=SOFT, ids=True),
    Terms("InfoNCE, soft margin, ids, mask", nce=True, nce_shift=SOFT, ids=True, mask=True),
    Terms("KL", kl=True),
    Terms("ListNet", list_net=True),
    Terms("dalr: margin, ids + KL", nce=True, kl=True, nce_shift=HARD, ids=True),
    Terms("triple, plain", nce=True, kl=True, list_net=True),
    Terms("triple, one margin", True, True, True, HARD, HARD, HARD),
    Terms("triple, soft margin", True, True, True, SOFT),
    Terms("InfoNCE, online", nce=True, online=True),
    Terms("triple, one margin, online", True, True, True, HARD, HARD, HARD, online=True),
)
QUICK = ("InfoNCE", "triple, one margin", "triple, soft margin")


class Case(NamedTuple):
    """One kernel to compile.

    Attributes:
        kernel: A `triton.JITFunction`.
        objective: Name of the objective, or the width of the vectors.
        dtype: Type of the operands.
        constants: Compile-time parameters; named tuples of `tl.constexpr` or plain numbers.
        tile: Shape of the tile, for the table.
        launch: Warps and pipeline stages where they are not Triton's defaults.
    """

    kernel: Kernel
    objective: str
    dtype: torch.dtype
    constants: dict[str, Flags | TileShape | bool | int]
    tile: tuple[int, ...]
    launch: dict[str, int]


class Row(NamedTuple):
    """What the binary of a kernel needs."""

    kernel: str
    objective: str
    dtype: str
    architecture: int
    tile: str
    registers: int
    stack: int
    shared: int
    loop_spills: int
    wgmma: bool

    def faults(self) -> list[str]:
        """Limits that the kernel exceeds."""
        found = []
        if self.stack > STACK_LIMIT:
            found.append(f"stack {self.stack} B")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"shared memory {self.shared} B")
        if self.loop_spills:
            found.append(f"{self.loop_spills} local accesses in loops")
        if self.architecture == 90 and self.dtype == "fp16" and self.dots and not self.wgmma:
            found.append("no wgmma")
        return found

    @property
    def dots(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return self.kernel in ("statistics_kernel", "gradient_kernel")


def cases(
    architecture: int, names: Sequence[str] = tuple(terms.name for terms in OBJECTIVES)
) -> Iterator[Case]:
    """Every shipped kernel for the named objectives.

    In float16 all objectives; in float32, where tiles are the same for all, and without gradient
    those of QUICK.
    """
    from dalr_kernels.fused.normalize_kernels import (
        normalize_gradient_kernel,
        normalize_kernel,
        tile_of,
    )

    for dtype in DTYPES:
        for objective in OBJECTIVES:
            quick = objective.name in QUICK
            if objective.name in names and (dtype == torch.float16 or quick):
                yield from row_cases(objective, dtype, (False, True) if quick else (True,))
                yield from tile_cases(objective, dtype, architecture)
        for kernel in (normalize_kernel, normalize_gradient_kernel):
            tile = tile_of(768)
            yield Case(kernel, "width 768", dtype, {**tile}, tuple(tile.values()), {})


def row_cases(objective: Terms, dtype: torch.dtype, gradients: tuple[bool, ...]) -> Iterator[Case]:
    """The kernel of mode "workspace"."""
    from dalr_kernels.fused.row_kernel import row_kernel
    from dalr_kernels.fused.workspace import row_launch

    for gradient in gradients:
        launch = row_launch(32768)
        block = launch.pop("BLOCK")
        constants = {"FLAGS": objective.flags(), "GRADIENT": gradient, "BLOCK": block}
        name = objective.name + ("" if gradient else " (no gradient)")
        yield Case(row_kernel, name, dtype, constants, (block,), launch)


def tile_cases(objective: Terms, dtype: torch.dtype, architecture: int) -> Iterator[Case]:
    """The two kernels of mode "stream"."""
    from dalr_kernels.fused.gradient_kernel import gradient_kernel
    from dalr_kernels.fused.statistics_kernel import statistics_kernel
    from dalr_kernels.fused.tile_tables import kind_of, tables

    flags = objective.flags()
    kernels = statistics_kernel, gradient_kernel
    for kernel, table in zip(kernels, tables(architecture), strict=True):
        tile = table[dtype, kind_of(flags)]
        constants = {"FLAGS": flags, "TILE": tile.shape(padded_width=768)}
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield Case(kernel, objective.name, dtype, constants, (tile.BM, tile.BN, tile.BK), launch)


# Types of the parameters that are not `i32` or `fp32`; "operand" is the type of the products.
TYPES = {
    **dict.fromkeys(
        ("losses", "states", "row_sums", "norms", "unit_grads", "vector_grads"), "*fp32"
    ),
    **dict.fromkeys(("student", "constants", "grads", "out"), "operand"),
    "vectors": "*bf16", "ids": "*i64",
}  # fmt: skip
FLOATS = ("margin", "threshold", "factors", "offsets", "weights", "weight", "factor")
# Integers that are multiples of 16 at run time, so that loads become vectors.
ALIGNED = {
    "padded_cols", "stride", "strides", "row_stride", "col_stride", "grad_stride", "out_stride",
    "width", "padded_width", "first_col", "last_col",
}  # fmt: skip


def fields_of(case: Case) -> dict[str, tuple[str, ...]]:
    """Names of the members of every parameter that is a named tuple."""
    from dalr_kernels.fused import arguments as groups

    found = {
        "constants": groups.Constants._fields, "ids": groups.Ids._fields,
        "margin": groups.Margin._fields, "strides": groups.Strides._fields,
        "factors": groups.PerSoftmax._fields, "offsets": groups.PerSoftmax._fields,
        "weights": groups.PerTerm._fields,
        "FLAGS": groups.Flags._fields, "TILE": groups.TileShape._fields,
    }  # fmt: skip
    if case.kernel.__name__ != "row_kernel":
        found["student"] = groups.Student._fields
    return found


def types_of(case: Case) -> Signature:
    """Types of all parameters by name; a named tuple of types for a named tuple."""
    fields = fields_of(case)
    found: Signature = {}
    for name in case.kernel.arg_names:
        kind = TYPES.get(name, "fp32" if name in FLOATS else "i32")
        kind = f"*{DTYPES[case.dtype]}" if kind == "operand" else kind
        kind = "constexpr" if name in case.constants else kind
        if name in fields:
            found[name] = namedtuple(name, fields[name])(*[kind] * len(fields[name]))
        else:
            found[name] = kind
    return found


def constants_of(case: Case) -> dict[tuple[int, ...], object]:
    """Compile-time values by the path of their parameter: its index, and that in a tuple."""
    found: dict[tuple[int, ...], object] = {}
    for name, value in case.constants.items():
        index = case.kernel.arg_names.index(name)
        if isinstance(value, tuple):
            found |= {(index, member): constant for member, constant in enumerate(value)}
        else:
            found[index,] = value
    return found


def aligned_paths(case: Case, types: Signature) -> list[tuple[int, ...]]:
    """Paths of all pointers, and of the integers that are multiples of 16."""
    found: list[tuple[int, ...]] = []
    for index, name in enumerate(case.kernel.arg_names):
        members = types[name]
        kind = members if isinstance(members, str) else members[0]
        if kind.startswith("*") or (kind == "i32" and name in ALIGNED):
            paths = [()] if isinstance(members, str) else [(k,) for k in range(len(members))]
            found += [(index, *path) for path in paths]
    return found


def build(case: Case, architecture: int) -> Row:
    """Compile one kernel for one architecture and read its binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants = types_of(case), constants_of(case)
    if "col_stride" in types:
        # Vectors are contiguous as a rule; Triton then takes their stride of 1 for a constant.
        constants[case.kernel.arg_names.index("col_stride"),] = 1
        types["col_stride"] = "constexpr"
    aligned = {path: [["tt.divisibility", 16]] for path in aligned_paths(case, types)}
    source = ASTSource(case.kernel, types, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), case.launch)
    cubin = compiled.asm["cubin"]
    usage = inspect(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    shape = "x".join(str(size) for size in case.tile)
    options = ", ".join(f"{k[4:]} {v}" for k, v in case.launch.items())
    return Row(
        case.kernel.__name__, case.objective, DTYPES[case.dtype], architecture,
        f"{shape}, {options}" if options else shape, int(found[1]), int(found[2]),
        compiled.metadata.shared, loop_spills(inspect(cubin, "-sass")),
        "wgmma.mma_async" in compiled.asm["ptx"],
    )  # fmt: skip


def inspect(cubin: bytes, option: str) -> str:
    """Output of cuobjdump, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True)
    return done.stdout


def loop_spills(sass: str) -> int:
    """Loads from and stores to local memory between the target of a backward branch and it."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    code = [(int(address, 16), text) for address, text in instructions]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        # A branch to itself is the padding at the end of a program.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    local = [address for address, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(low <= address <= high for low, high in loops) for address in local)


def markdown(rows: Sequence[Row]) -> str:
    """Markdown table, faults in the last column."""
    head = ("kernel", "terms", "type", "sm", "tile", "regs", "stack", "shared", "spills", "faults")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        fields = (*row[:-1], "; ".join(row.faults()) or "-")
        lines.append("| " + " | ".join(str(field) for field in fields) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print or write the table; 1 if any limit is exceeded."""
    import triton

    parser = argparse.ArgumentParser(description="Compile all kernels without a GPU.")
    parser.add_argument("--quick", action="store_true", help="few kernels, to the screen")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="only kernels or terms with this text")
    parser.add_argument("--output", type=Path, help="file for the table of a selection")
    options = parser.parse_args(arguments)
    rows = []
    for architecture in options.arch:
        for case in cases(architecture, QUICK) if options.quick else cases(architecture):
            if options.match in f"{case.kernel.__name__} {case.objective} {DTYPES[case.dtype]}":
                rows.append(build(case, architecture))
                print(*rows[-1], *rows[-1].faults(), sep=" | ", file=sys.stderr, flush=True)
    whole = not (options.quick or options.match or options.arch != list(ARCHITECTURES))
    output = options.output or (REPORT if whole else None)
    if output is None:
        print(markdown(rows))
    else:
        output.parent.mkdir(exist_ok=True)
        title = f"# Kernels compiled ahead of time, Triton {triton.__version__}\n\n"
        output.write_text(title + NOTE + markdown(rows))
    return int(any(row.faults() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
