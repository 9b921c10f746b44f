"""Compile a Triton kernel for a GPU that is not here, and read what it needs: no driver, only Triton's own assembler."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448}
"""Most shared memory of one program on sm_80 (A100) and sm_90 (H100, H200)."""


@dataclass(frozen=True)
class Compiled:
    """Resources of one variant."""

    shared_bytes: int
    registers: int
    stack_bytes: int
    """Spilled registers and local arrays, bytes a thread."""
    ptx: str

    def uses(self, instruction: str) -> bool:
        """An instruction stands in the code: 'wgmma.mma_async' (Hopper's tensor cores), 'mma.sync' (those before)."""
        return f"\t{instruction}." in self.ptx


def compile_ahead(
    kernel: Any,
    arch: int,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile `kernel` for sm_`arch`. signature: '*fp32', '*bf16', 'i32', 'fp32' by argument; constants: constexprs by name.

    Pointers and i32 arguments are taken to be divisible by 16, as the launcher finds them for aligned tensors.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name] != "constexpr" and types[name] != "fp32"
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=types, constexprs=values, attrs=attributes)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # a tenth of the time
        options = {"num_warps": num_warps, "num_stages": num_stages}
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(built.metadata.shared, int(registers), int(stack), built.asm["ptx"])
