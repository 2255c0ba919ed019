"""DeferredCheck: what a call's info says, told before the next call, once."""

from __future__ import annotations

import pytest
import torch
from cfl_ops._core.deferred import DeferredCheck
from torch import Tensor


def test_a_failure_is_told_once_and_named() -> None:
    check = DeferredCheck("cholesky_append", "the call before")
    check.check()  # nothing to tell
    check.defer(torch.tensor([0, 3]), tuple)
    with pytest.raises(torch.linalg.LinAlgError, match=r"Batch element 1.*order 3") as caught:
        check.check()
    assert caught.value.__notes__ == ["the call before"]
    check.check()


def test_what_a_message_needs_is_made_for_a_message_only() -> None:
    made: list[float] = []

    def context() -> list[Tensor]:
        made.append(1.0)
        return [torch.tensor(-1.0)]

    check = DeferredCheck("cholesky_update", "")
    check.defer(torch.tensor(0), context)
    check.check()
    assert not made
    check.defer(torch.tensor(2), context)
    with pytest.raises(torch.linalg.LinAlgError, match="pivot 2"):
        check.check()
    assert made == [1.0]


@pytest.mark.gpu
def test_the_copy_to_the_host_does_not_synchronise() -> None:
    info = torch.ones((), dtype=torch.int32, device="cuda")
    check = DeferredCheck("cholesky_append", "")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        check.defer(info, tuple)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(torch.linalg.LinAlgError):
        check.check()
