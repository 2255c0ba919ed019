"""Compile every Triton kernel, as its launcher calls it, for cards that are not here.

``python -m tests.gpu.compile_kernels sm_80 sm_90 ...`` runs the launchers on CPU tensors with launching replaced by
``triton.compile`` for each architecture (with ``--samples`` on those of the contract table), and prints one JSON line
for each kernel: options, registers, spills and shared memory as ptxas reports them, and what gram's main loops are made
of. tests/gpu/test_compile_kernels.py reads them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
import cfl_ops
import torch
import triton
from cfl_ops._core.op import OPS
from cfl_ops._gpu.device import Device, pretend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

CARDS = {
    "sm_80": Device("NVIDIA A100", "sm_80", 108, 163 << 10),
    "sm_86": Device("NVIDIA RTX A6000", "sm_86", 84, 99 << 10),
    "sm_89": Device("NVIDIA RTX 4090", "sm_89", 128, 99 << 10),
    "sm_90": Device("NVIDIA H100", "sm_90", 132, 227 << 10),
    "sm_100": Device("NVIDIA B200", "sm_100", 148, 227 << 10),
    "sm_120": Device("NVIDIA RTX 5090", "sm_120", 170, 99 << 10),
}
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
LARGEST_GRID = (2**31 - 1, 65535, 65535)
DISASSEMBLED = ("_gram_kernel", "_plane_kernel")  # the tools take a second for each kernel
seen: set[str] = set()
card = CARDS["sm_80"]
label = ""


def compile_instead(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """What a launch of ``kernel`` would compile; an error where the grid is beyond what cards take."""
    grid = grid(kwargs) if callable(grid) else grid
    if grid[0] > LARGEST_GRID[0] or any(
        n > most for n, most in zip(grid[1:], LARGEST_GRID[1:], strict=False)
    ):
        what = {"kernel": kernel.fn.__name__, "case": label, "architecture": card.architecture}
        print(json.dumps(what | {"error": f"the grid {grid} is beyond {LARGEST_GRID}"}), flush=True)
    options = {k: kwargs.pop(k) for k in list(kwargs) if k not in kernel.arg_names}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            shape = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    key = repr((kernel.fn.__name__, signature, constants, attributes, options, card.architecture))
    if key in seen:
        return
    seen.add(key)
    target = GPUTarget("cuda", int(card.architecture[3:]), 32)
    line = {"kernel": kernel.fn.__name__, "case": label, "architecture": card.architecture}
    line |= {"options": options | {k: v for k, v in kwargs.items() if isinstance(v, int | bool | str)}}
    try:
        binary = triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=target, options=options
        )
        line |= {
            "shared": binary.metadata.shared,
            "allowed": card.shared_memory,
            **resources(binary.asm["cubin"]),
            "loop": main_loop(binary.asm["cubin"]) if kernel.fn.__name__ in DISASSEMBLED else {},
        }
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
    print(json.dumps(line), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of a thread's stack: what is spilled lies there."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        key: int(re.search(rf"{word}:(\d+)", text)[1])
        for key, word in (("registers", "REG"), ("stack", "STACK"))
    }


def is_matrix(instruction: str) -> bool:
    """Whether it is one of the tensor cores': mma.sync, wgmma, tcgen05."""
    return re.match(r"(HMMA|DMMA|HGMMA|UTC\w*MMA)", instruction) is not None


def main_loop(cubin: bytes) -> dict[str, int]:
    """How often each instruction stands in the innermost loop with the most matrix instructions; none without any.

    ``WAIT`` counts waits that let no warpgroup product run on.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    most: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", line):
            code.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", code[-1])
            if back and back[1] in labels:
                most = max(most, code[labels[back[1]] :], key=lambda body: sum(map(is_matrix, body)))
    counts = Counter(i.split()[0] for i in most if any(map(is_matrix, most)))
    counts["WAIT"] = sum(bool(re.search("WARPGROUP.DEPBAR.LE gsb0, 0x0$", i.strip())) for i in most)
    return dict(counts)


def cases() -> list[tuple[str, Callable[[], Any]]]:
    """Calls of every op that has a Triton launcher, at sizes that reach each of its tuning rules."""
    gram = OPS["gram"].launcher("triton")  # gram_ launches what gram does
    update, solve = OPS["cholesky_update"].launcher("triton"), OPS["ridge_solve"].launcher("triton")
    out: list[tuple[str, Callable[[], Any]]] = []

    def add(text: str, call: Callable[[], Any]) -> None:
        out.append((text, call))

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        name = str(dtype)[6:]
        for width in (48, 256, 1024):
            x = torch.zeros(4096, width, dtype=dtype)
            add(f"gram {name} {width}", lambda x=x, acc=acc: gram(x, None, None, False, 0, acc))
        pair = torch.zeros(2, 4096, 512, dtype=dtype)  # not for planes
        add(f"gram {name} 2 x 512", lambda x=pair, acc=acc: gram(x, None, None, False, 0, acc))
        x, labels = torch.zeros(4096, 512, dtype=dtype), torch.zeros(4096, dtype=torch.int64)
        y, s = torch.zeros(4096, 100, dtype=dtype), torch.ones(4096, dtype=acc)
        add(f"gram {name} classes, bias", lambda x=x, y=labels, acc=acc: gram(x, y, None, True, 10, acc))
        add(f"gram {name} weighted", lambda x=x, y=y, s=s, acc=acc: gram(x, y, s, False, 0, acc))

        if acc == torch.float32:
            other = torch.zeros(4096, 3, dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
            add(f"gram {name}, other targets", lambda x=x, y=other: gram(x, y, None, True, 0, torch.float32))
            # float64 sums of narrower features
            x, y = torch.zeros(512, 96, dtype=dtype), torch.zeros(512, 3, dtype=dtype)
            add(f"gram {name}, float64 sums", lambda x=x, y=y: gram(x, y, None, True, 0, torch.float64))
        for kind in (torch.float16, torch.bfloat16):  # weights that are narrower than the sums
            for sums in {acc, torch.float64}:
                x, s = torch.zeros(512, 96, dtype=dtype), torch.ones(512, dtype=kind)
                text = f"gram {name}, weights {str(kind)[6:]}, {str(sums)[6:]} sums"
                add(text, lambda x=x, s=s, sums=sums: gram(x, None, s, True, 0, sums))

    def one_product() -> None:
        torch.set_float32_matmul_precision("high")
        for width in (256, 2048):
            gram(torch.zeros(4096, width), None, None, False, 0, torch.float32)
            gram(torch.zeros(4096, width), None, torch.ones(4096), False, 0, torch.float32)
        torch.set_float32_matmul_precision("highest")

    add("gram float32, one TF32 product", one_product)
    for dtype in (torch.float32, torch.float64):
        for order, rank in ((64, 1), (512, 16), (2048, 1), (4096, 16)):
            L, V = torch.eye(order, dtype=dtype), torch.zeros(order, rank, dtype=dtype)
            add(f"cholesky_update {order}, {rank}", lambda L=L, V=V: update(L, V, 1.0, 1.0))
            add(f"cholesky_downdate {order}, {rank}", lambda L=L, V=V: update(L, V, -1.0, 1.0))
        for order, columns in ((5, 1), (16, 3), (32, 10), (64, 64)):
            a, b = torch.eye(order, dtype=dtype).repeat(3, 1, 1), torch.zeros(3, order, columns, dtype=dtype)
            add(f"ridge_solve {order}, {columns}", lambda a=a, b=b: solve(a, b, torch.zeros(()), None))
    proximal = OPS["proximal_step"].launcher("triton")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, width, targets in ((16, 64, 10), (32, 512, 100), (128, 2048, 1000)):
            phi, w = torch.zeros(rows, width, dtype=dtype), torch.zeros(targets, width)
            y, b = torch.zeros(rows, dtype=torch.int64), torch.zeros(targets)
            rest = (torch.ones(()), None, None, None, 0, 0, 0)
            add(f"proximal_step {rows} x {width}", lambda a=(phi, y, w, b, *rest): proximal(*a))
            dense = torch.zeros(rows, targets, dtype=torch.bfloat16)
            narrow = (phi, dense, w.bfloat16(), None, *rest)
            add(f"proximal_step {rows} x {width}, bfloat16 weight and targets", lambda a=narrow: proximal(*a))
    # More matrices, and more right sides, than the second axis of a grid has places.
    many = 70_000
    x, labels = torch.zeros(many, 16, 16), torch.zeros(many, 16, dtype=torch.int64)
    add("gram, many", lambda: gram(x, labels, None, True, 3, torch.float32))
    phi, y, w, b = x[:, :3], labels[:, :3], torch.zeros(many, 5, 16), torch.zeros(many, 5)
    rest = (torch.ones(()), None, None, None, 0, 0, 0)
    add("proximal_step, many", lambda: proximal(phi, y, w, b, *rest))
    eyes, v = torch.eye(4).repeat(many, 1, 1), torch.zeros(many, 4, 5)
    add("cholesky_update, many", lambda: update(eyes, v, 1.0, 1.0))
    add("ridge_solve, many", lambda: solve(eyes, v, torch.zeros(()), None))
    add("ridge_solve, many sides", lambda: solve(eyes[0], torch.zeros(4, 32 * many), torch.zeros(()), None))
    return out


def samples() -> list[tuple[str, Callable[[], Any]]]:
    """Every sample of the contract table: what tests/gpu/test_gpu.py will launch."""
    from tests import contract

    return [
        (f"{spec.op.name}, {case.name}, {dtype}", lambda s=spec, c=case, d=dtype: s.op.launcher("triton")(*c.make(d)))
        for spec in contract.load()
        if spec.op.kernel("triton")
        for case in spec.cases
        for dtype in case.dtypes
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    global card, label
    JITFunction.run = compile_instead  # type: ignore[method-assign]
    chosen = samples() if "--samples" in arguments else cases()
    with cfl_ops.config.use_backend("python"):
        for architecture in [a for a in arguments if a in CARDS] or CARDS:
            card = CARDS[architecture]
            with pretend(card):
                for label, call in chosen:  # noqa: B007
                    call()


if __name__ == "__main__":
    main(sys.argv[1:])
