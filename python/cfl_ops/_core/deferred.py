"""A check of an op's info that the host makes later, so that it need not wait for a GPU now."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfl_ops._core.failures import any_failed, capturing, check_info


class DeferredCheck:
    """What the last call's info says, looked at before the next call.

    :meth:`defer` starts a copy of info to the host and does not synchronise; :meth:`check` waits for that copy,
    which is there by then as a rule, and raises what the op's public function would have raised at once.
    """

    def __init__(self, name: str, note: str) -> None:
        """``name`` is that of the error message; ``note`` is added to it and says which call it was."""
        self._name, self._note = name, note
        self._info: Tensor | None = None
        self._context: Callable[[], Sequence[Tensor]] = tuple
        self._copied: torch.Event | None = None

    def defer(self, info: Tensor, context: Callable[[], Sequence[Tensor]]) -> None:
        """Leave a call's info to the next :meth:`check`; a call that a CUDA graph captures is not checked.

        ``context`` makes what the error message needs, if there is an error.
        """
        if capturing(info):
            return
        if info.is_cuda:
            stream = torch.cuda.current_stream(info.device)  # the copy's, whatever the current device
            info = torch.empty(info.shape, dtype=info.dtype, pin_memory=True).copy_(info, non_blocking=True)
            self._copied = stream.record_event()
        self._info, self._context = info, context

    def check(self) -> None:
        """Raise what was left to this check, once. Waits for a GPU to have done that call, no longer."""
        info = self._info
        if info is None:
            return
        context, copied = self._context, self._copied
        self._info, self._context, self._copied = None, tuple, None
        if copied is not None:
            copied.synchronize()
        if any_failed(info):
            try:
                check_info(self._name, info, [], context())
            except Exception as error:
                error.add_note(self._note)
                raise
