"""Checkpoints into models: ties, dtypes, meta devices, what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor, nn

from tests.codec.helpers import same


class Small(nn.Module):
    """Tied weights, a norm, buffers that are saved and not, a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(30, 20)
        self.norm = nn.BatchNorm1d(20)
        self.outside = nn.Linear(30, 20)
        self.outside.weight = self.inside.weight
        self.turned = nn.Parameter(torch.randn(9, 40).t())
        self.register_buffer("table", torch.randn(11))
        self.register_buffer("scratch", torch.randn(5), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, 3))


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "cflz": lambda state, folder: cfl_ops.save_file(state, folder / "model.cflz", lossless=True),
    "safetensors": cfl_ops.save_safetensors,
    "shards": lambda state, folder: cfl_ops.save_safetensors(state, folder, max_shard_size=900),
}


def changed(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(same(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", WRITERS)
def test_into_a_model(backend: str, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    source, target = Small(), Small()
    WRITERS[kind](source.state_dict(), tmp_path)
    places = {name: value.data_ptr() for name, value in target.state_dict().items()}
    parameters = list(target.parameters())
    scratch = target.scratch.clone()
    assert cfl_ops.load_model(target, tmp_path) == ([], [])
    assert equal(source, target)
    assert {name: value.data_ptr() for name, value in target.state_dict().items()} == places
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    assert all(value.requires_grad for value in parameters)
    assert same(target.scratch, scratch)


@pytest.mark.parametrize("kind", WRITERS)
def test_into_a_model_without_data(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    source = Small()
    source.norm.weight.requires_grad_(False)
    WRITERS[kind](source.state_dict(), tmp_path)
    with torch.device("meta"):
        target = Small()
        target.norm.weight.requires_grad_(False)
    assert cfl_ops.load_model(target, tmp_path, device="cpu") == ([], [])
    assert equal(source, target)
    assert target.outside.weight is target.inside.weight
    assert isinstance(target.turned, nn.Parameter)
    assert target.turned.requires_grad
    assert not target.norm.weight.requires_grad
    assert target.scratch.is_meta


def test_other_dtypes_are_converted(tmp_path: Path) -> None:
    source, path = Small(), tmp_path / "a.cflz"
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    half = Small().to(torch.bfloat16)
    cfl_ops.load_model(half, path)
    for name, value in half.state_dict().items():
        assert same(value, source.state_dict()[name].to(value.dtype))
    with torch.device("meta"):
        half = Small().to(torch.bfloat16)
    cfl_ops.load_model(half, path)
    assert half.turned.dtype == torch.bfloat16


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    source, path = Small(), tmp_path / "a.safetensors"
    state = dict(source.state_dict())
    for message, change in {
        r"other shapes: 'table' of \(11,\) \(the file: \(12,\)\)": lambda s: s.update(table=torch.ones(12)),
        r"other shapes: 'turned' of \(40, 9\) \(the file: \(9, 40\)\)": lambda s: s.update(
            turned=torch.ones(9, 40)
        ),
        "names that the file lacks: 'table'": lambda s: s.pop("table"),
        "names that the model lacks: 'more'": lambda s: s.update(more=torch.ones(1)),
        "lacks: 'turned'; names that the model lacks: '../turned'": lambda s: s.update(
            {"../turned": s.pop("turned")}
        ),
        "names that the model lacks: 'scratch'": lambda s: s.update(scratch=torch.ones(5)),
    }.items():
        bad = dict(state)
        change(bad)
        cfl_ops.save_safetensors(bad, path)
        target = Small()
        before = changed(target)
        with pytest.raises(ValueError, match=f"load_model: model must have the tensors of .*{message}"):
            cfl_ops.load_model(target, path)
        assert all(same(before[name], value) for name, value in target.state_dict().items())
        if "shapes" in message:
            with pytest.raises(ValueError, match="other shapes"):
                cfl_ops.load_model(target, path, strict=False)
    bad = {name: value for name, value in state.items() if name != "table"} | {"more": torch.ones(1)}
    cfl_ops.save_safetensors(bad, path)
    table = target.table.clone()
    assert cfl_ops.load_model(target, path, strict=False) == (["table"], ["more"])
    assert same(target.table, table)
    assert same(target.turned, source.turned)
    with pytest.raises(TypeError, match="model must be a module, but got dict"):
        cfl_ops.load_model({}, path)  # type: ignore[arg-type]
    many = nn.Module()
    for i in range(12):
        many.register_buffer(f"b{i}", torch.ones(1))
    with pytest.raises(ValueError, match="'b7' and 4 more"):
        cfl_ops.load_model(many, path)


def test_ties_on_one_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, path = Small(), tmp_path / "a.safetensors"
    state = dict(source.state_dict())
    del state["outside.weight"]  # as transformers writes it
    cfl_ops.save_safetensors(state, path)
    target = Small()
    assert cfl_ops.load_model(target, path) == ([], [])
    assert equal(source, target)
    loose = Small()
    loose.outside.weight = nn.Parameter(torch.randn(20, 30))
    with pytest.raises(ValueError, match=r"names that the file lacks: 'outside\.weight'"):
        cfl_ops.load_model(loose, path)
    cfl_ops.save_safetensors(source.state_dict(), path)
    cfl_ops.load_model(loose, path)
    assert equal(source, loose)
    assert loose.outside.weight is not loose.inside.weight


def test_modules_that_load_in_their_own_way(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.ModuleDict({"head": cfl_ops.learn.ClosedFormLinear(6, 3), "body": nn.Linear(6, 6)})

    source, target, path = make(), make(), tmp_path / "a.cflz"
    source["head"].update(torch.randn(20, 6), torch.randn(20, 3))  # type: ignore[index,operator]
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    assert cfl_ops.load_model(target, path) == ([], [])
    assert equal(source, target)
    bad = dict(source.state_dict())
    name = next(name for name in bad if name.startswith("head."))
    bad[name] = torch.ones(77)
    cfl_ops.save_file(bad, path, lossless=True)
    with pytest.raises(ValueError, match="load_model: model's head refuses"):
        cfl_ops.load_model(target, path)
    assert equal(source, target)


class Doubled(nn.Linear):
    """Has a way of its own to load: what it gets is twice what it holds."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name] / 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class Reader(nn.Linear):
    """A load_state_dict of its own."""

    called = 0

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self.called += 1
        return super().load_state_dict(*args, **options)


def hooked(model: nn.Module, kind: str) -> list[Any]:
    calls: list[Any] = []
    if kind == "before":
        model.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: calls.append(prefix))
    else:
        model.register_load_state_dict_post_hook(lambda module, keys: calls.append(list(keys.missing_keys)))
    return calls


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_hooks_are_called_and_nothing_stays_without_data(
    tmp_path: Path, device: str, kind: str, inside: bool
) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        model = nn.ModuleDict({"a": Small(), "b": nn.Linear(30, 20, bias=False)}) if inside else Small()
        if inside:
            model["b"].weight = model["a"].inside.weight  # type: ignore[index]
        return model

    source, path = make(), tmp_path / "a.cflz"
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    with torch.device(device):
        target = make()
    calls = hooked(target["a"] if inside else target, kind)  # type: ignore[index]
    assert cfl_ops.load_model(target, path) == ([], [])
    assert calls == [{"before": "a." if inside else "", "after": []}[kind]]
    assert equal(source, target)
    small = target["a"] if inside else target  # type: ignore[index]
    assert small.outside.weight is small.inside.weight
    assert isinstance(small.turned, nn.Parameter)
    if inside:
        assert target["b"].weight is small.inside.weight  # type: ignore[index]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_models_own_load_state_dict_is_called(tmp_path: Path, device: str) -> None:
    source, path = nn.Linear(5, 4), tmp_path / "a.cflz"
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    with torch.device(device):
        target = Reader(5, 4)
        inner = nn.ModuleDict({"r": Reader(5, 4)})
        bound = nn.Linear(5, 4)
    assert cfl_ops.load_model(target, path) == ([], [])
    assert target.called == 1
    assert equal(source, target)
    bound.load_state_dict = lambda state, strict=True: None  # type: ignore[method-assign,assignment,misc]
    if device == "cpu":
        assert cfl_ops.load_model(bound, path) == ([], [])
    # torch does not call that of a part of a model.
    cfl_ops.save_file(
        {f"r.{name}": value for name, value in source.state_dict().items()}, path, lossless=True
    )
    assert cfl_ops.load_model(inner, path) == ([], [])
    assert inner["r"].called == 0
    assert equal(source, inner)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("strict", [False, True])
def test_all_is_as_it_was_if_a_module_refuses(tmp_path: Path, device: str, strict: bool) -> None:
    """One that loads in its own way, after another was loaded."""
    path = tmp_path / "a.cflz"

    def make() -> nn.ModuleDict:
        made = nn.ModuleDict(
            {"a": Doubled(4, 4), "b": nn.BatchNorm1d(4), "c": Doubled(4, 4), "d": nn.Linear(4, 4)}
        )
        made["d"].weight = made["a"].weight
        return made

    state = {name: torch.ones_like(value) for name, value in make().state_dict().items()}
    changes: list[tuple[str, dict[str, Tensor | None]]] = [
        ("c refuses.*Doubled:.*size mismatch", {"c.weight": torch.ones(5, 5)})
    ]
    if strict:
        changes += [
            ("c refuses.*Missing key", {"c.weight": None}),
            ("c refuses.*Unexpected", {"c.more": torch.ones(1)}),
        ]
    for message, change in changes:
        bad = {name: value for name, value in (state | change).items() if value is not None}
        cfl_ops.save_file(bad, path, lossless=True)
        with torch.device(device):
            target = make()
        tensors, before = target.state_dict(keep_vars=True), changed(target)
        with pytest.raises(ValueError, match=f"(?s)load_model: model's {message}"):
            cfl_ops.load_model(target, path, strict)
        assert all(value is tensors[name] for name, value in target.state_dict(keep_vars=True).items())
        if device == "meta":
            assert all(value.is_meta for value in tensors.values())
        else:
            assert all(same(value, before[name]) for name, value in target.state_dict().items())

    class Stubborn(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            self.weight.data.fill_(7)
            self.weight = nn.Parameter(torch.zeros(1))
            raise KeyError("no")

    linear = Stubborn(4, 4)
    weight, kept = linear.weight, linear.weight.detach().clone()
    with pytest.raises(KeyError, match="no"):
        cfl_ops.load_model(linear, path)
    assert linear.weight is weight
    assert same(weight.detach(), kept)


def test_ways_of_their_own_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.cflz"
    shared = Doubled(4, 4)
    target = nn.ModuleDict({"a": shared, "again": shared, "c": nn.Linear(4, 4)})
    state = {name: torch.full_like(value, 8) for name, value in target.state_dict().items()}
    cfl_ops.save_file(state, path, lossless=True)
    assert cfl_ops.load_model(target, path) == ([], [])
    assert bool((shared.weight == 4).all())
    assert bool((target["c"].weight == 8).all())
    # One whose shapes come with the file.
    for device in ("cpu", "meta"):
        with torch.device(device):
            lazy = nn.ModuleDict({"c": nn.LazyLinear(4)})
        cfl_ops.save_file({"c.weight": torch.ones(4, 9), "c.bias": torch.ones(4)}, path, lossless=True)
        assert cfl_ops.load_model(lazy, path) == ([], [])
        assert same(lazy["c"].weight.detach(), torch.ones(4, 9))
        lazy = nn.ModuleDict({"c": nn.LazyLinear(4)})
        cfl_ops.save_file({"c.weight": torch.ones(4, 9)}, path, lossless=True)
        with pytest.raises(ValueError, match=r'Missing key.*"c\.bias"'):
            cfl_ops.load_model(lazy, path)
        assert nn.parameter.is_lazy(lazy["c"].weight)

    class Keeps(nn.Linear):
        """Puts what it had before back, on the meta device."""

        def _load_from_state_dict(self, *args: Any) -> None:
            self.weight = nn.Parameter(torch.empty(4, 4, device="meta"))

    with torch.device("meta"):
        keeps = Keeps(4, 4, bias=False)
    cfl_ops.save_file({"weight": torch.ones(4, 4)}, path, lossless=True)
    with pytest.raises(ValueError, match="model's 'weight' stays on the meta device"):
        cfl_ops.load_model(keeps, path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_with_a_module_that_loads_in_its_own_way(tmp_path: Path, device: str) -> None:
    path = tmp_path / "a.safetensors"

    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    def make() -> nn.ModuleDict:
        made = nn.ModuleDict({"own": Own(4, 4), "plain": nn.Linear(4, 4), "other": Own(4, 4)})
        made["plain"].weight = made["other"].weight = made["own"].weight
        return made

    torch.manual_seed(0)
    source = make()
    names = ["own.weight", "plain.weight", "other.weight"]
    for kept in names:
        state = {n: v for n, v in source.state_dict().items() if n == kept or n not in names}
        cfl_ops.save_safetensors(state, path)
        with torch.device(device):
            target = make()
        assert cfl_ops.load_model(target, path) == ([], [])
        assert equal(source, target)
        assert target["plain"].weight is target["own"].weight is target["other"].weight
    # Without any of them each is missing, and stays as it was.
    state = {n: v for n, v in source.state_dict().items() if n not in names}
    cfl_ops.save_safetensors(state, path)
    with torch.device(device):
        target = make()
    before = target["own"].weight
    missing, unexpected = cfl_ops.load_model(target, path, strict=False)
    assert (sorted(missing), unexpected) == (sorted(names), [])
    assert target["plain"].weight is target["own"].weight is before
    with pytest.raises(ValueError, match=r"own refuses: .*\n.*Missing key"):
        cfl_ops.load_model(target, path)
    assert target["own"].weight is before
    assert not target["plain"].bias.is_meta


def test_what_cannot_be_written_to_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.cflz"
    cfl_ops.save_file({"a": torch.ones(3), "b": torch.ones(3)}, path, lossless=True)
    with torch.inference_mode():
        inference = torch.zeros(3)
    for value, message in (
        (torch.zeros(1).expand(3), r"'b' has elements that share memory \(expanded\)"),
        (inference, "'b' was made in inference mode"),
    ):
        model = nn.Module()
        model.register_buffer("a", torch.zeros(3))
        model.register_buffer("b", value)
        with pytest.raises(
            ValueError, match=f"model must have tensors that can be written to, but {message}"
        ):
            cfl_ops.load_model(model, path)
        assert model.a.tolist() == [0, 0, 0]


def test_a_transformer_with_tied_embeddings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=120,
        n_positions=32,
        n_embd=48,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = torch.randint(0, 120, (2, 20))
    want = model(tokens).logits
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    cfl_ops.save_safetensors(model.state_dict(), tmp_path, max_shard_size="60KB", metadata={"format": "pt"})
    cfl_ops.save_file(model.state_dict(), tmp_path / "model.cflz", lossless=True)
    for path in (tmp_path / "plain", tmp_path, tmp_path / "model.cflz"):
        other = transformers.GPT2LMHeadModel(config).eval()
        assert not torch.equal(other(tokens).logits, want)
        assert cfl_ops.load_model(other, path) == ([], [])
        assert torch.equal(other(tokens).logits, want)
        assert other.lm_head.weight is other.transformer.wte.weight
    # transformers' own way, of a state dict that is decoded first
    state = cfl_ops.load_file(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state).eval()
    assert torch.equal(again(tokens).logits, want)
