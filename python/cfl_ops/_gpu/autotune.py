"""``python -m cfl_ops autotune``: time the candidates of each Triton kernel on this card and keep the fastest."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfl_ops._core import dispatch
from cfl_ops._core.op import OPS, UNSERVED
from cfl_ops._gpu import tuning
from cfl_ops._gpu.device import device_of

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Problem:
    """One size of an op: the rule that its winner becomes, and a call to time."""

    rule: dict[str, Any]
    call: Callable[[], Any]


@dataclass(frozen=True)
class Tunable:
    """What there is to choose for one op."""

    candidates: Callable[[], Iterator[dict[str, Any]]]
    problems: Callable[[torch.device], Iterator[Problem]]


def _grid(**choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _gram_candidates() -> Iterator[dict[str, Any]]:
    def shapes(how: str, *choices: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
        for tile, wide, warps in choices:
            yield from _grid(
                how=(how,), TILE=(tile,), TILE_N=(wide,), DEPTH=(32, 64), num_warps=(warps,),
                num_stages=(2, 3, 4), resident=(1, 2),
            )  # fmt: skip

    yield from itertools.islice(shapes("library", (64, 64, 4)), 1)  # no shape changes it
    yield from itertools.islice(shapes("exact", (32, 32, 4)), 1)
    yield from shapes("pointers", (32, 32, 4), (64, 64, 4), (128, 128, 4), (128, 128, 8))
    yield from shapes("planes", (64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8))


def _gram_problems(device: torch.device) -> Iterator[Problem]:
    gram = OPS["gram"].launcher("triton")
    kinds = (
        ("half", torch.bfloat16, torch.float32, "highest"),
        ("tf32", torch.float32, torch.float32, "high"),
        ("tf32x3", torch.float32, torch.float32, "highest"),
        ("float64", torch.float64, torch.float64, "highest"),
    )
    for kind, dtype, acc, precision in kinds:
        for order, bound in ((64, 64), (256, 384), (512, 768), (1024, 1536), (2048, 3072), (4096, None)):
            x = torch.randn(65536 if dtype != torch.float64 else 8192, order, device=device).to(dtype)

            def call(x: torch.Tensor = x, acc: torch.dtype = acc, precision: str = precision) -> Any:
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision(precision)
                try:
                    return gram(x, None, None, False, 0, acc)
                finally:
                    torch.set_float32_matmul_precision(before)

            # Rules for one matrix; others keep those of the package.
            planes = {"planes": True} if kind != "float64" else {}
            yield Problem({"kind": kind, **planes, **({"max_order": bound} if bound else {})}, call)


def _cross_problems(device: torch.device) -> Iterator[Problem]:
    gram = OPS["gram"].launcher("triton")
    for kind, dtype in (("half", torch.bfloat16), ("tf32x3", torch.float32)):
        x = torch.randn(65536, 1024, device=device).to(dtype)
        for targets, bound in ((10, 16), (100, None)):
            labels = torch.randint(targets, (65536,), device=device)

            def call(x: torch.Tensor = x, labels: torch.Tensor = labels, targets: int = targets) -> Any:
                return gram(x, labels, None, False, targets, torch.float32)

            yield Problem({"kind": kind, **({"max_targets": bound} if bound else {})}, call)


def _update_problems(device: torch.device) -> Iterator[Problem]:
    update = OPS["cholesky_update"].launcher("triton")
    for dtype in (torch.float32, torch.float64):
        for order, rank, bound in ((128, 4, 512), (1024, 4, 1024), (2048, 1, 2048), (4096, 16, None)):
            L = torch.eye(order, device=device, dtype=dtype)
            V = torch.randn(order, rank, device=device, dtype=dtype)
            rule = {"element": dtype.itemsize, **({"max_order": bound} if bound else {})}
            yield Problem(rule, lambda L=L, V=V: update(L, V, 1.0, 1.0))  # type: ignore[misc]


def _solve_problems(device: torch.device) -> Iterator[Problem]:
    solve = OPS["ridge_solve"].launcher("triton")
    for order in (8, 16, 32, 64):
        a = torch.randn(10000, order, order, device=device)
        a = a @ a.mT + torch.eye(order, device=device)
        b = torch.randn(10000, order, 1, device=device)
        lam = torch.zeros((), dtype=torch.float64)
        yield Problem({"max_order": order}, lambda a=a, b=b, lam=lam: solve(a, b, lam, None))  # type: ignore[misc]


def _tiled_problems(device: torch.device) -> Iterator[Problem]:
    lam = torch.zeros((), dtype=torch.float64)
    backend = "native" if dispatch.native_available() else "nvrtc"
    if backend == "nvrtc" and not dispatch.nvrtc_available():
        return  # no kernel, and nothing to choose
    solve = OPS["ridge_solve"].launcher(backend)
    for order, batch in (
        (128, 1),
        (128, 64),
        (128, 512),
        (256, 1),
        (256, 128),
        (512, 1),
        (512, 32),
        (2048, 1),
    ):
        a = torch.randn(batch, order, order, device=device)
        a = a @ a.mT + torch.eye(order, device=device)
        b = torch.randn(batch, order, 1, device=device)
        rule = {"max_order": order, "max_batch": batch, "max_columns": 128}
        yield Problem(rule, lambda a=a, b=b: solve(a, b, lam, None))  # type: ignore[misc]


def _proximal_problems(device: torch.device) -> Iterator[Problem]:
    step = OPS["proximal_step"].launcher("triton")
    options = 0, 0, 0  # the mean, a penalized bias, any method: ops/proximal/codes.py
    rest = (torch.ones((), dtype=torch.float64), None, None, None, *options)
    for rows, width, targets in ((32, 2048, 100), (128, 2048, 1000)):
        phi = torch.randn(rows, width, device=device)
        labels = torch.randint(targets, (rows,), device=device)
        weight, bias = torch.randn(targets, width, device=device), torch.randn(targets, device=device)
        args = (phi, labels, weight, bias, *rest)
        yield Problem({"max_rows": rows}, lambda args=args: step(*args))  # type: ignore[misc]


TUNABLE = {
    "gram": Tunable(_gram_candidates, _gram_problems),
    "gram_cross": Tunable(
        lambda: _grid(
            TILE=(32, 64, 128),
            TILE_K=(16, 32),
            DEPTH=(32, 64),
            num_warps=(4,),
            num_stages=(2, 3),
            waves=(2, 4),
        ),
        _cross_problems,
    ),
    "cholesky_update": Tunable(
        lambda: _grid(held=(8192, 16384, 32768), vectors=(16,), num_warps=(4, 8, 16)), _update_problems
    ),
    "proximal_step": Tunable(
        lambda: _grid(
            TILE_K=(16, 32),
            num_warps=(4, 8),
            factor_warps=(2, 4, 8),
            single=(False, True),
        ),
        _proximal_problems,
    ),
    "ridge_solve_tiled": Tunable(lambda: _grid(tiled=(True, False)), _tiled_problems),
    "ridge_solve": Tunable(
        lambda: _grid(columns=(32,), num_warps=(1, 2, 4, 8), single=(False, True)), _solve_problems
    ),
}


def event_timer(call: Callable[[], Any]) -> float:
    """The median time of a call in milliseconds, by device events."""
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"))


def tune(
    op: str, tunable: Tunable, device: torch.device, timer: Timer, say: Callable[[str], None]
) -> list[Any]:
    """The rules of an op: for each problem the fastest candidate that runs."""
    rules = []
    for problem in tunable.problems(device):
        best: tuple[float, dict[str, Any]] | None = None
        for candidate in tunable.candidates():
            try:
                with tuning.force(op, candidate):
                    if problem.call() is UNSERVED:  # would be the fastest of all
                        raise RuntimeError("the kernel leaves this problem to the fallback")
                    took = timer(problem.call)
            except Exception as error:  # too much shared memory, too many registers: not for this card
                say(f"{op} {problem.rule} {candidate}: {type(error).__name__}")
                continue
            if best is None or took < best[0]:
                best = (took, candidate)
        if best is None:
            say(f"{op} {problem.rule}: no candidate runs")
            continue
        say(f"{op} {problem.rule}: {best[1]} {best[0]:.4f} ms")
        rules.append({"if": problem.rule, "use": best[1], "ms": round(best[0], 5)})
    return rules


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code, 1 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m cfl_ops autotune", description=__doc__)
    parser.add_argument(
        "--op", action="append", choices=sorted(TUNABLE), help="only this op (may be repeated)"
    )
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: the user's own for this card)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("cfl_ops autotune: there is no CUDA device, so there is nothing to measure", file=sys.stderr)
        return 1
    if not dispatch.triton_available():
        print("cfl_ops autotune: triton is not installed", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    card = device_of(device)
    path = options.output or tuning.user_file(card)
    rules = tuning.read(path) if path.is_file() else {}
    for op in options.op or TUNABLE:
        rules[op] = tune(op, TUNABLE[op], device, event_timer, print)
        tuning.write(path, card, rules, "Written by python -m cfl_ops autotune.")  # what is done is kept
    tuning.forget()
    print(f"wrote {path}")
    return 0
