"""The samples of the contract table on the CUDA kernels of linear algebra, emulated (see on_host.py)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.on_host import check_sample, check_samples, samples

SAMPLES = samples("ridge_solve", "small_pinv", "cholesky_update", "cholesky_update_")


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("spec", "case", "dtype"), SAMPLES)
def test_samples_of_the_contract(
    kernels, spec, case, dtype, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFL_ON_HOST_ORDER", order)
    check_samples(kernels, spec, case, dtype, order)


@pytest.mark.parametrize(
    ("spec", "case", "dtype"), [p for p in SAMPLES if p.values[2] in (torch.float32, torch.float64)]
)
def test_cupys_launcher_passes_the_samples_of_the_contract(nvrtc, spec, case, dtype) -> None:
    check_sample(nvrtc, spec, case, case.make(dtype))
