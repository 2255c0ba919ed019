"""The outside does not change when the inside moves: names, signatures, schemas of ops, pickles of results.

``data/frozen.json`` was written before the package got its folders; a change of the API edits it on purpose:
``python -m tests.core.test_frozen``. (The bytes of the codec are in tests/codec.)
"""

from __future__ import annotations

import inspect
import io
import json
import pickle
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import arrays, config, learn

FROZEN = Path(__file__).parents[1] / "data" / "frozen.json"
MODULES = {"cfl_ops": cfl_ops, "cfl_ops.learn": learn, "cfl_ops.config": config, "cfl_ops.arrays": arrays}
INTERNAL = ("cfl_ops::cuda_", "cfl_ops::host_")


def signature(item: Any) -> str | None:
    try:
        return str(inspect.signature(item))
    except ValueError:
        return None


def outside() -> dict[str, dict[str, Any]]:
    """All that a user can name."""
    out: dict[str, dict[str, Any]] = {"names": {}, "signatures": {}, "schemas": {}, "members": {}}
    for name, module in MODULES.items():
        out["names"][name] = sorted(module.__all__)
        for item_name in module.__all__:
            item = getattr(module, item_name)
            if callable(item):
                out["signatures"][f"{name}.{item_name}"] = signature(item)
            if isinstance(item, type):
                out["members"][f"{name}.{item_name}"] = {
                    member: signature(value) if callable(value) else type(value).__name__
                    for member, value in sorted(vars(item).items())
                    if not member.startswith("_")
                }
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("cfl_ops::") and not schema.name.startswith(INTERNAL):
            out["schemas"][schema.name] = str(schema)
    return out


@pytest.mark.parametrize("what", ["names", "signatures", "schemas", "members"])
def test_the_outside_is_frozen(what: str) -> None:
    assert outside()[what] == json.loads(FROZEN.read_text())[what]


def results() -> dict[str, Any]:
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    return {
        "GramMoments": cfl_ops.gram(x, y),
        "ProximalStep": cfl_ops.proximal_step(x, y, torch.zeros(1, 2), lam=1.0),
        "SafeCholesky": cfl_ops.safe_cholesky(torch.eye(2)),
        "RidgeCVResult": cfl_ops.ridge_cv(
            torch.arange(12.0).view(6, 2) % 5, torch.arange(6.0).view(6, 1), [0.1, 1.0]
        ),
        "QuantizedTensor": cfl_ops.quantize(torch.arange(6.0), 4),
    }


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert type(got[name]) is type(value) is getattr(cfl_ops, name)
        for mine, theirs in zip(got[name], value, strict=True):
            if isinstance(theirs, torch.Tensor):
                # Those of ridge_cv had float32's rounding.
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
            else:
                assert mine == theirs


def test_results_saved_before_the_move_load() -> None:
    """Their pickles name modules that are gone; ``torch.load`` (weights only) knows them."""
    assert_same(torch.load(Path(__file__).parents[1] / "data" / "results_flat.pt"), results())


def test_results_name_the_package_in_their_pickles() -> None:
    file = io.BytesIO()
    torch.save(results(), file)
    file.seek(0)
    assert_same(torch.load(file), results())
    for name, value in results().items():
        assert f"ccfl_ops\n{name}\n".encode() in pickle.dumps(value, protocol=0)


def test_public_classes_say_that_they_are_the_packages() -> None:
    classes = [getattr(cfl_ops, name) for name in cfl_ops.__all__]
    assert {c.__module__ for c in classes if isinstance(c, type)} <= {"cfl_ops", "cfl_ops.errors", "torch._C"}


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(outside(), indent=1, sort_keys=True) + "\n")
