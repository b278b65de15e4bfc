"""Compile every Triton kernel for an H100 (sm_90), and print registers, spills and the widest memory access of each.

    python benchmarks/kernel_resources.py

No GPU is needed. The exit status is 1 if a kernel spills registers or does not access rows in words of 16 bytes.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: the interpreter compiles nothing

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.kernels import combine, cross_entropy, group, join, swiglu, top_k, wide_linear

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROW_WORD_BYTES = 16
MULTIPLES = ("width", "stride", "experts", "size", "columns", "inner", "a_row", "a_inner", "b_column", "b_inner",
             "inner_per_program")  # fmt: skip
"""Arguments that are taken to be multiples of 16."""


class Case(NamedTuple):
    """A kernel with the types of its arguments, in order, and its constants."""

    kernel: Any
    types: str
    constants: dict[str, Any]
    label: str
    word_bytes: int = ROW_WORD_BYTES
    """The widest access that is expected. Widths and strides are taken to be multiples of 16."""


def cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        yield Case(swiglu.forward_kernel, f"*{dtype} " * 3 + "i32 " * 3, swiglu.BLOCKS, dtype)
        yield Case(swiglu.backward_kernel, f"*{dtype} " * 5 + "i32 " * 3, swiglu.BLOCKS, dtype)
        for dim, top in ((512, 1), (2048, 2), (7168, 8), (16384, 24)):
            constants = combine.blocks(top, dim)
            for weighted in (False, True):
                constants = {**constants, "WEIGHTED": weighted}
                weights = "*fp32" if weighted else f"*{dtype}"
                types = f"*{dtype} *i64 {weights} *{dtype} i32 i32 i32"
                yield Case(combine.gather_kernel, types, constants, f"{dtype} D={dim} K={top} {weighted=}")
                types = f"*{dtype} *i64 {weights} *{dtype} *{dtype} {weights} i32 i32 i32"
                yield Case(combine.scatter_kernel, types, constants, f"{dtype} D={dim} K={top} {weighted=}")
        types = f"*{dtype} *i64 *fp32 i32 i32 i32"
        yield Case(cross_entropy.statistics_kernel, types, cross_entropy.STATISTICS, dtype)
        constants = {**cross_entropy.GRADIENT, "IN_TURN": dtype == "bf16"}
        types = f"*{dtype} *i64 *fp32 i32 *fp32 i32 i32 i32"
        yield Case(cross_entropy.gradient_kernel, types, constants, dtype)
    for split in (False, True):
        constants = {"BLOCK": join.BLOCK, "SPLIT": split, "num_warps": 4}
        yield Case(join.join_kernel, "*fp32 *fp32 *bf16 i32", constants, f"{split=}")
    for experts, top in ((8, 2), (64, 6), (256, 8), (1024, 32)):
        constants = {**top_k.blocks(experts), "K": top}
        yield Case(top_k.top_k_kernel, "*fp32 *i64 i32 i32", constants, f"E={experts} K={top}", 4)
    block = {"BLOCK": group.RANK_BLOCK, "num_warps": 4}
    yield Case(group.rank_kernel, "*i64 *i32 *i32 i32 i32", block, "", 4)
    yield Case(group.place_kernel, "*i64 *i32 *i32 *i32 *i64 *i64 i32 i32", block, "", 4)
    yield Case(wide_linear.split_kernel, "*fp32 *i16 i32", wide_linear.SPLIT, "")
    types = "*bf16 *bf16 *bf16 *bf16 *fp32 i32 i32 i32 i32 i32 i32"  # two of the strides are 1
    for tokens, experts in ((1, 128), (4096, 8), (4096, 128)):
        constants = {**wide_linear.blocks(tokens, experts), "a_inner": 1, "b_inner": 1}
        yield Case(wide_linear.matmul_kernel, types, constants, f"forward T={tokens} E={experts}")
    constants = {**wide_linear.blocks(2048, 128), "a_row": 1, "b_column": 1}
    yield Case(wide_linear.matmul_kernel, types, constants, "gradient of the weight D=2048 E=128")


def resources(case: Case) -> tuple[int, int, int]:
    """Return registers a thread, instructions that spill them, and the bytes of the widest access."""
    constants = dict(case.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    names = [name for name in case.kernel.arg_names if name not in constants]
    types = dict(zip(names, case.types.split(), strict=True))
    source = ASTSource(
        fn=case.kernel,
        signature={name: types.get(name, "constexpr") for name in case.kernel.arg_names},
        constexprs=constants,
        # `top_k`, `tokens` and `rows` are not multiples of 16 in general, widths and strides of good models are
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(case.kernel.arg_names)
            if name in types and (name in MULTIPLES or types[name].startswith("*"))
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    accesses = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return int(registers), spills, max(int(vector or 1) * int(bits) // 8 for vector, bits in accesses)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"triton {triton.__version__}")
    failed = 0
    for case in cases():
        registers, spills, word = resources(case)
        wrong = spills > 0 or word < case.word_bytes
        failed += wrong
        name = f"{case.kernel.__module__.rpartition('.')[2]}.{case.kernel.__name__}"
        warps = case.constants["num_warps"]
        print(
            f"{name:<24} {case.label:<34} warps={warps:<2} registers={registers:<3} spills={spills} "
            f"word={word} bytes{'  FAILED' if wrong else ''}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
