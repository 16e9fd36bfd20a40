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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dalr_kernels.fused.tuning import HARD, PLAIN, SOFT

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
STACK_LIMIT = 16
REPORT = Path(__file__).parents[1] / "bench" / "compile_report.md"
NOTE = """Written by `python -m dalr_kernels.compile_report`; no GPU is involved. Shared memory and
stack in bytes; spills are local loads and stores inside loops.

"""
DTYPES = {torch.float16: "fp16", torch.float32: "fp32"}


class Terms(NamedTuple):
    """Compile-time switches of one objective."""

    name: str
    nce: bool = False
    kl: bool = False
    net: bool = False
    nce_shift: int = PLAIN
    kl_shift: int = PLAIN
    net_shift: int = PLAIN
    ids: bool = False
    mask: bool = False
    online: bool = False

    def switches(self) -> dict[str, Any]:
        """As `engine.kernel_switches` gives them."""
        return {
            "NCE": self.nce, "KL": self.kl, "NET": self.net, "NCE_SHIFT": self.nce_shift,
            "KL_SHIFT": self.kl_shift, "NET_SHIFT": self.net_shift, "CLAMP": False,
            "POLYNOMIAL": True, "ONE_TEACHER": self.kl and self.net,
            "TAUGHT_LABELS": self.kl and self.nce_shift == SOFT,
            "IDS": self.ids, "MASK": self.mask, "ONLINE": self.online,
        }  # fmt: skip


# What the presets and the benchmark run, and the online forms.
OBJECTIVES = (
    Terms("InfoNCE", nce=True),
    Terms("InfoNCE, margin, ids", nce=True, nce_shift=HARD, ids=True),
    Terms("InfoNCE, soft margin, ids", nce=True, nce_shift=SOFT, ids=True),
    Terms("InfoNCE, soft margin, ids, mask", nce=True, nce_shift=SOFT, ids=True, mask=True),
    Terms("KL", kl=True),
    Terms("ListNet", net=True),
    Terms("dalr: margin, ids + KL", nce=True, kl=True, nce_shift=HARD, ids=True),
    Terms("triple, plain", nce=True, kl=True, net=True),
    Terms("triple, one margin", True, True, True, HARD, HARD, HARD),
    Terms("triple, soft margin", True, True, True, SOFT),
    Terms("InfoNCE, online", nce=True, online=True),
    Terms("triple, one margin, online", True, True, True, HARD, HARD, HARD, online=True),
)
QUICK = ("InfoNCE", "triple, one margin", "triple, soft margin")


class Case(NamedTuple):
    """One kernel to compile."""

    kernel: Any
    objective: str
    dtype: torch.dtype
    constants: dict[str, Any]
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
        return self.kernel in ("statistics_kernel", "slopes_kernel")


def cases(
    architecture: int, names: Sequence[str] = tuple(terms.name for terms in OBJECTIVES)
) -> Iterator[Case]:
    """Every shipped kernel for the named objectives.

    In float16 all objectives; in float32, where tiles are the same for all, and without gradient
    those of QUICK.
    """
    from dalr_kernels.fused import stream
    from dalr_kernels.fused.launch import row_launch
    from dalr_kernels.fused.rows import row_kernel
    from dalr_kernels.fused.tiles import slopes_kernel, statistics_kernel
    from dalr_kernels.fused.units import tile_of, unit_gradient_kernel, unit_kernel

    statistics, slopes = stream.tables(architecture)
    for dtype in DTYPES:
        for objective in OBJECTIVES:
            quick = objective.name in QUICK
            if objective.name not in names or (dtype == torch.float32 and not quick):
                continue
            switches = objective.switches()
            for gradient in (False, True) if quick else (True,):
                launch = row_launch(32768)
                constants = switches | {"GRADIENT": gradient, "BLOCK": launch.pop("BLOCK")}
                name = objective.name + ("" if gradient else " (no gradient)")
                yield Case(row_kernel, name, dtype, constants, launch)
            for kernel, table in ((statistics_kernel, statistics), (slopes_kernel, slopes)):
                tile = table[dtype, stream.kind_of(switches)]._asdict()
                launch = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
                yield Case(kernel, objective.name, dtype, switches | tile | {"EVEN": True}, launch)
        for kernel in (unit_kernel, unit_gradient_kernel):
            yield Case(kernel, "width 768", dtype, tile_of(768), {})


def types_of(case: Case) -> dict[str, str]:
    """Types of all parameters, by name."""
    pointers = {
        "losses": "*fp32", "states": "*fp32", "row_sums": "*fp32", "norms": "*fp32",
        "grads": "*fp32", "row_ids": "*i64", "col_ids": "*i64", "vectors": "*bf16",
    }  # fmt: skip
    matrices = {
        "student", "kl_teacher", "net_teacher", "labels", "scores", "slopes", "student_rows",
        "student_cols", "out",
    }  # fmt: skip
    found = {}
    for name in case.kernel.arg_names:
        if name in case.constants:
            found[name] = "constexpr"
        elif name in pointers:
            found[name] = pointers[name]
        elif name == "out" and case.kernel.__name__ == "unit_gradient_kernel":
            found[name] = "*fp32"
        elif name in matrices:
            found[name] = f"*{DTYPES[case.dtype]}"
        elif re.search("factor|offset|weight|margin|threshold", name):
            found[name] = "fp32"
        else:
            found[name] = "i32"
    return found


# Integers that are multiples of 16 at run time, so that loads become vectors.
ALIGNED = {
    "padded_cols", "stride", "row_stride", "col_stride", "grad_stride", "out_stride", "width",
    "padded_width", "first_col", "last_col",
}  # fmt: skip


def build(case: Case, architecture: int) -> Row:
    """Compile one kernel for one architecture and read its binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types_of(case)
    constants = dict(case.constants)
    if case.kernel.__name__.startswith("unit"):
        # Vectors are contiguous as a rule; Triton then takes their stride of 1 for a constant.
        constants["col_stride"] = 1
        types["col_stride"] = "constexpr"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(case.kernel.arg_names)
        if types[name].startswith("*") or (types[name] == "i32" and name in ALIGNED)
    }
    source = ASTSource(case.kernel, types, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), case.launch)
    cubin = compiled.asm["cubin"]
    usage = inspect(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    tile = {k: v for k, v in case.constants.items() if k in ("BM", "BN", "BK", "ROWS", "BLOCK")}
    shape = "x".join(str(v) for v in tile.values())
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
        cells = (*row[:-1], "; ".join(row.faults()) or "-")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
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
