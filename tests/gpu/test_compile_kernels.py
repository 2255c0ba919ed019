"""What compiles for which card, without a GPU: Triton to cubins, nvcc for every architecture, and NVRTC."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cfl_ops._core import dispatch
from cfl_ops._gpu import nvrtc, sources
from cfl_ops.ops.codec import cuda as _codec_cuda

ROOT = Path(__file__).parents[2]
# One of each kind every time; all of them with -m slow.
QUICK, ALL = ("sm_90", "sm_120"), ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("architectures", "options"),
    [
        pytest.param(QUICK, (), id="quick"),
        pytest.param(ALL, (), id="all", marks=pytest.mark.slow),
        pytest.param(ALL, ("--samples",), id="samples", marks=pytest.mark.slow),
    ],
)
def test_triton_kernels_compile(architectures: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Within the shared memory that the card has (99 KB on consumer cards), and a few spilled registers at most.

    The loops of gram keep the tensor cores fed. The samples are those that test_gpu.py will launch.
    """
    if not dispatch.triton_available():
        pytest.skip("triton is not installed")
    pytest.importorskip("triton.backends.nvidia")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile_kernels", *architectures, *options],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["architecture"] for line in lines} == set(architectures)
    bad = [
        line
        for line in lines
        if "error" in line
        or line["shared"] > line["allowed"]
        or line["registers"] < 8  # Triton 3.6 makes a mere trap of what it cannot lower for sm_100
    ]
    assert not bad, "\n".join(map(str, bad))
    slow = [(why, line) for line in lines if (why := slow_loop(line))] if not options else []
    assert not slow, "\n".join(map(str, slow))
    # The careful kernel runs on systems in doubt alone, and a float64 cosine reduces its argument on the stack.
    spilled = [line for line in lines if line["stack"] > 32 and line["kernel"] != "_careful_kernel"]
    if spilled and version("triton").startswith("3.8."):
        named = ", ".join(sorted({f"{line['kernel']} for {line['case']}" for line in spilled}))
        pytest.skip(f"Triton 3.8 (of torch 2.14) spills registers where Triton 3.6 spills none: {named}")
    assert not spilled, "\n".join(map(str, spilled))


def slow_loop(line: dict) -> str:
    """What is wrong with the main loop of a Gram kernel, as machine code: nothing, for any other kernel."""
    loop, options, hopper = line["loop"], line["options"], line["architecture"] == "sm_90"
    loads = {name for name in loop if name.startswith(("LDG", "UTMALDG")) and name != "LDGDEPBAR"}
    if line["kernel"] == "_plane_kernel":
        matrix = "HGMMA" if hopper else "UTC"  # the newest products of sm_90 and sm_100
        if not any(name.startswith(matrix) for name in loop):
            return "no warpgroup products"
        if any(not name.startswith("UTMALDG") for name in loads):
            return "loads that are not the copy engine's"
        if hopper and any(name.startswith(("LDS", "STS", "LDL", "STL")) for name in loop):
            return "operands pass through registers"
        if options["PLANES"] == 1 and loop["WAIT"]:
            return "each product waits for the last"
    if line["kernel"] == "_gram_kernel" and not options["WEIGHTED"]:
        if loads - {"LDGSTS.E.BYPASS.128"}:
            return "loads that are not asynchronous copies of 16 bytes"
        if "float16" in line["case"] and "float64" not in line["case"] and loop["WAIT"]:
            return "each product waits for the last"
    return ""


# Bytes that a kernel may spill, by its mangled name: 64 x 64 in float64 takes all registers of 32 lanes, and a tile's
# one warp of factor or substitution may, so that two blocks fit a multiprocessor.
ALLOWED = {
    "solve_small_kernelIfdLi64": 400,
    "solve_small_kernelIddLi64": 400,
    "solve_tiled_kernel": 128,
}


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


@pytest.mark.parametrize(
    "architectures",
    [pytest.param(QUICK[:1], id="quick"), pytest.param(ALL, id="all", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", ["codec.cu", "gram.cu", "solve.cu", "cholesky.cu"])
def test_cuda_kernels_compile(name: str, architectures: tuple[str, ...], tmp_path: Path) -> None:
    """Without warnings; spills stay within a few registers, and shared memory within what a block may have."""
    for architecture in architectures:
        done = subprocess.run(
            [nvcc(), "-std=c++20", f"-arch={architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c",
             str(ROOT / "csrc" / "cuda" / name), "-o", str(tmp_path / "out.o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "warning" not in done.stderr, done.stderr[:2000]
        spills = re.findall(r"Function properties for (\w+)\n.* (\d+) bytes spill stores", done.stderr)
        assert spills
        for kernel, spilled in spills:
            assert int(spilled) <= next((n for name, n in ALLOWED.items() if name in kernel), 32), kernel
        static = re.findall(
            r"Compiling entry function '(\w+)'.*\n(?:.*\n)*?.*Used \d+ registers(.*)", done.stderr
        )
        assert len(static) == done.stderr.count("Compiling entry function")
        for kernel, used in static:
            fixed = int(found[1]) if (found := re.search(r"(\d+) bytes smem", used)) else 0
            assert fixed + dynamic_shared(kernel) <= SHARED, kernel


SHARED = 99 << 10
"""Bytes of shared memory that a block may have on consumer cards. Elsewhere, too, only the codec's ask for more."""


def dynamic_shared(kernel: str) -> int:
    """The most that the launchers ask for beside a kernel's static shared memory."""
    if small := re.search(r"solve_(small|pinv)_kernelI(\w)(\w)?Li(\d+)E", kernel):
        kind, first, second, order = small.groups()
        computed = "d" if kind == "pinv" else second or first
        element = 8 if computed == "d" else 4
        systems, warps, held = nvrtc._small_solve(int(order), element)
        return warps * (held + (systems * 2 * int(order) * 8 if kind == "pinv" else 0))
    if "codec_encode" in kernel or "codec_decode" in kernel:
        return SHARED - _codec_cuda.STATIC_SHARED  # as much as the card has
    if "codec_histogram" in kernel or "codec_quantize" in kernel:
        return 4 * sources.constant("codec", "kMaxShared")
    return 0


def nvrtc_library() -> ctypes.CDLL:
    folders = [Path(p) / "nvidia" for p in sys.path if p]
    found = [p for f in folders if f.is_dir() for p in f.glob("*/lib/libnvrtc.so.*")]
    candidates = [str(p) for p in found] + ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    pytest.skip("no NVRTC library is installed (pip install nvidia-cuda-nvrtc)")


# The largest takes half a minute, and is the same C++ as the others'.
FAMILIES = [
    pytest.param(family, marks=pytest.mark.slow if family == "solve" else ()) for family in sources.HEADERS
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_120", marks=pytest.mark.slow)])
def test_the_very_sources_compile_with_nvrtc(architecture: str, family: str) -> None:
    """With no folder of headers, as CuPy gives them to it; and every kernel is found by its name."""
    nvrtc = nvrtc_library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source, names = sources.source(family).encode(), [name.encode() for name in nvrtc.names(family)]
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"cfl_ops.cu", 0, None, None) == 0
    for name in names:
        assert nvrtc.nvrtcAddNameExpression(program, name) == 0
    options = [option.encode() for option in (*nvrtc.OPTIONS, f"-arch={architecture}")]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
    assert "warning" not in log.value.decode(), log.value.decode()
    lowered = ctypes.c_char_p()
    for name in names:
        assert nvrtc.nvrtcGetLoweredName(program, name, ctypes.byref(lowered)) == 0, name
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    assert size.value > 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.mark.parametrize("family", sources.HEADERS)
def test_every_kernel_of_the_sources_is_among_the_names(family: str) -> None:
    written = set(re.findall(r"(\w+_kernel)\(", sources.source(family)))
    assert written == {re.sub(r"^cfl::cuda::|<.*", "", name) for name in nvrtc.names(family)}


def test_finiteness_is_not_asked_by_a_difference() -> None:
    """Compilers fuse x - x with the product that x is, and what is left is its rounding error, not 0."""
    for path in [*(ROOT / "triton_kernels").glob("*.py"), *(ROOT / "csrc" / "cuda").iterdir()]:
        code = re.sub(r"(#|//).*", "", path.read_text())
        assert not re.search(r"\b(\w+) - \1\b", code), path.name


def test_constants_are_read_from_the_sources() -> None:
    """Each that the launchers ask for is there, and so are expressions."""
    asked: set[tuple[str, str]] = set()
    for path in (ROOT / "python/cfl_ops").rglob("*.py"):
        text = path.read_text()
        families = dict(re.findall(r'^([A-Z]+) = Constants\("(\w+)"\)', text, flags=re.MULTILINE))
        asked |= {(families[n], k) for n, k in re.findall(r"\b([A-Z]+)\.(k[A-Z]\w+)", text) if n in families}
    assert len(asked) > 12
    for family, name in asked:
        assert sources.constant(family, name) > 0
    assert sources.constant("codec", "kWarps") == 8  # kThreads / 32
    assert sources.constant("codec", "kPart") == 1 << 15
    assert sources.constant("cholesky", "kBadL") == 2**31 - 2  # kBadV - 1


def test_cupy_would_get_sources_from_an_installed_package() -> None:
    """The wheel carries them (pyproject.toml); here they are found in the working tree."""
    assert '"cfl_ops/csrc/cuda" = "csrc/cuda"' in (ROOT / "pyproject.toml").read_text()
    text = "".join(map(sources.source, sources.HEADERS))
    assert "#include" not in text.replace('#include "cuda_on_host.h"', "").replace(
        "#include <cuda_runtime.h>", ""
    ).replace("#include <cstdint>", "")
    assert os.linesep in text
