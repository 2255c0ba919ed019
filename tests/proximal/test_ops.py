"""proximal_step: what the contract table does not say."""

from __future__ import annotations

import io

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops.ops.proximal import arguments
from torch.nn import functional as F

OPS = ("proximal_step", "proximal_step_")


def problem(rows=6, width=9, targets=3, dtype=torch.float64):
    return (
        torch.randn(rows, width, dtype=dtype),
        torch.randn(rows, targets, dtype=dtype),
        torch.randn(targets, width, dtype=dtype),
        torch.randn(targets, dtype=dtype),
    )


@pytest.mark.parametrize("shape", [(6, 9), (20, 5)])
@pytest.mark.parametrize("fit_bias", ["penalized", "free"])
def test_minimises_the_stated_objective(shape, fit_bias, backend: str) -> None:
    """The gradient of the docstring's objective, by autograd, vanishes at the new head."""
    features, target, weight, bias = problem(*shape)
    s = torch.rand(shape[0], dtype=torch.float64)
    lam, ridge = 0.3, 0.2
    diag = torch.rand(shape[1], dtype=torch.float64)
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=lam, ridge=ridge, lam_diag=diag,
                                 sample_weight=s, fit_bias=fit_bias)  # fmt: skip
    w, b = step.weight.clone().requires_grad_(), step.bias.clone().requires_grad_()
    residual = target - F.linear(features, w, b)
    loss = (s * residual.square().sum(-1)).sum() / s.sum()
    penalty = ((lam + diag) * (w - weight).square()).sum() + ridge * w.square().sum()
    if fit_bias == "penalized":
        penalty = penalty + lam * (b - bias).square().sum() + ridge * b.square().sum()
    grads = torch.autograd.grad(loss + penalty, (w, b))
    assert max(float(g.abs().max()) for g in grads) < 1e-13
    torch.testing.assert_close(step.loss, loss.detach())


@pytest.mark.parametrize("shape", [(6, 9), (20, 5)])
def test_gradient_is_the_envelope(shape, backend: str) -> None:
    """grad_features is the total derivative of the whole objective at the minimiser (Prop. 3.1)."""
    features, target, weight, bias = problem(*shape)
    features.requires_grad_()
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.4)
    change = (step.weight - weight).square().sum() + (step.bias - bias).square().sum()
    (total,) = torch.autograd.grad(step.loss + 0.4 * change, features)
    torch.testing.assert_close(step.grad_features.detach(), total)


def test_class_indices_equal_one_hot(backend: str) -> None:
    features, _, weight, bias = problem(7, 4, 5)
    labels = torch.randint(5, (7,))
    a = cfl_ops.proximal_step(features, labels, weight, bias, lam=0.1)
    b = cfl_ops.proximal_step(features, F.one_hot(labels, 5).double(), weight, bias, lam=0.1)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rows", [4, 30])
def test_in_place_equals_functional(rows: int, backend: str) -> None:
    features, target, weight, bias = problem(rows)
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.2)
    loss, grad = cfl_ops.proximal_step_(features, target, weight, bias, lam=0.2)
    for a, b in zip(step, (weight, bias, loss, grad), strict=True):
        assert torch.equal(a, b)


def test_weights_of_one_and_counts_agree(backend: str) -> None:
    """A row of weight 2 counts as the row twice."""
    features, target, weight, bias = problem(3)
    twice = torch.tensor([0, 1, 1, 2])
    a = cfl_ops.proximal_step(features, target, weight, bias, lam=0.2,
                              sample_weight=torch.tensor([1.0, 2.0, 1.0]))  # fmt: skip
    b = cfl_ops.proximal_step(features[twice], target[twice], weight, bias, lam=0.2)
    for x, y in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("fit_bias", [None, "free", "penalized"])
def test_a_row_of_weight_zero_has_a_derivative(rows: int, fit_bias: str | None, backend: str) -> None:
    """That of a weight just above zero, in the weights and in everything else."""
    features, target, weight, bias = problem(rows, 7)
    features.requires_grad_()
    s = torch.rand(rows, dtype=torch.float64)
    s[[0, 2]] = 0

    def outcome(s: torch.Tensor) -> torch.Tensor:
        step = cfl_ops.proximal_step(
            features, target, weight, None if fit_bias is None else bias, lam=0.2, sample_weight=s,
            fit_bias=fit_bias or "penalized",
        )  # fmt: skip
        return step.loss + step.weight.square().sum() + step.grad_features.sum()

    def gradients(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = s.requires_grad_()
        return torch.autograd.grad(outcome(s), (s, features))

    at, above = gradients(s.clone()), gradients(s.clamp(min=1e-9))
    for got, expected in zip(at, above, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    higher = s.clone()
    higher[0] = 1e-7
    slope = (outcome(higher) - outcome(s)) / 1e-7
    torch.testing.assert_close(at[0][0], slope.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-50, torch.float64),
        (1e-40, torch.float64),
        (1e-40, torch.float32),
        (3e38, torch.float64),
        (3e38, torch.float32),
        (1e60, torch.float64),
    ],
)
def test_of_a_mean_only_the_ratios_of_row_weights_count(
    rows: int, size: float, dtype: torch.dtype, backend: str
) -> None:
    """Weights far beyond the range of float32 squares, or of float32 itself."""
    features, target, weight, bias = problem(rows, 7, dtype=torch.float32)
    s = torch.linspace(0.1, 1, rows, dtype=torch.float64)
    plain = cfl_ops.proximal_step(features, target, weight, bias, lam=0.2, sample_weight=s)
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.2, sample_weight=(size * s).to(dtype))
    for got, expected in zip(step, plain, strict=True):  # 1e-40 has five digits in float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 20])
def test_what_is_wider_than_the_head_is_not_narrowed(rows: int, backend: str) -> None:
    """A bias and penalties in float64 beside features and weights in float32."""
    features, target, weight, _ = problem(rows, 7, dtype=torch.float32)
    bias = torch.full((3,), 1e9 + 0.125, dtype=torch.float64)  # float32: 1e9
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=1e9)
    wide = cfl_ops.proximal_step(features.double(), target.double(), weight.double(), bias, lam=1e9)
    assert step.bias is not None
    assert step.bias.dtype == torch.float64
    assert step.loss.dtype == torch.float32
    torch.testing.assert_close(step.bias, wide.bias, rtol=1e-12, atol=0)
    tiny = torch.full((7,), 1e-46, dtype=torch.float64)
    _, info = cfl_ops.proximal_step_ex(features, target, weight, lam=0.0, lam_diag=tiny)
    assert int(info) >= 0  # a penalty, though none that helps: not the error for none


def test_what_leaves_a_dtype_says_so(backend: str) -> None:
    features, target, weight, bias = problem(3, 2, targets=1, dtype=torch.float32)
    half = bias.half()
    with pytest.raises(torch.linalg.LinAlgError, match="leaves the range of float16"):
        cfl_ops.proximal_step(features, target + 1e6, weight, half, lam=0.1, fit_bias="free")
    with pytest.raises(torch.linalg.LinAlgError, match="leaves the range of float16"):
        cfl_ops.rescaled_proximal_step(
            features, torch.tensor([0, 0, 0]), weight, half, lam=0.1, kappa=10.0, target_scale=1e6
        )
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match=r"cfl_ops\.proximal_step: "):
        cfl_ops.proximal_step(features, target.double() * 1e300, weight, lam=0.1)


@pytest.mark.parametrize("weights", [None, torch.zeros(2)])
def test_no_data_is_no_step(weights, backend: str) -> None:
    features, target, weight, bias = problem(0 if weights is None else 2)
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.2, ridge=0.3, sample_weight=weights)
    assert torch.equal(step.weight, weight)
    assert torch.equal(step.bias, bias)
    assert step.loss < 1e-28  # that of the stored head: not 0, but rounding
    assert torch.equal(step.grad_features, torch.zeros_like(features))


def test_lambda_of_zero_interpolates_where_it_can(backend: str) -> None:
    features, target, weight, bias = problem(4, 9)
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.0)
    torch.testing.assert_close(F.linear(features, step.weight, step.bias), target)
    assert step.loss < 1e-28  # that of the stored head: not 0, but rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_singular_raises_and_leaves_the_head(shape, dtype, backend: str) -> None:
    features, target, weight, bias = problem(*shape, dtype=dtype)
    features[1] = features[0]
    features[:, 2] = features[:, 1]
    old = weight.clone(), bias.clone()
    with pytest.raises(torch.linalg.LinAlgError, match=r"cfl_ops\.proximal_step: the system is singular"):
        cfl_ops.proximal_step_(features, target, weight, bias, lam=0.0)
    (loss, grad), info = cfl_ops.proximal_step_ex_(features, target, weight, bias, lam=0.0)
    assert info > 0
    assert loss.isnan()
    assert not grad.any()
    assert torch.equal(weight, old[0])
    assert torch.equal(bias, old[1])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_bad_data_is_named_and_changes_nothing(shape, backend: str) -> None:
    features, target, weight, bias = problem(*shape)
    labels = torch.zeros(shape[0], dtype=torch.int64)

    def at(tensor, *index, value=torch.nan):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    cases = [
        ((at(features, 3, 1), target, weight, bias), {}, ValueError, "features has NaN or Inf in row 3", -1),
        ((at(features, 0, 1, value=torch.inf), labels, weight, bias), {}, ValueError, "Inf in row 0", -1),
        ((features, at(target, 2, 0), weight, bias), {}, ValueError, "target has NaN or Inf in row 2", -2),
        ((features, at(labels, 4, value=3), weight, bias), {}, IndexError, r"from 0 to 2 .*got 3 in row 4", -2),
        ((features, at(labels, 1, value=-1), weight, bias), {}, IndexError, "but got -1 in row 1", -2),
        ((features, target, at(weight, 0, 0), bias), {}, ValueError, "weight or bias has NaN or Inf", -3),
        ((features, target, weight, at(bias, 1)), {}, ValueError, "weight or bias has NaN or Inf", -3),
        ((features, target, weight, bias), {"lam": torch.tensor(-1.0)}, ValueError, "finite and not neg", -4),
        ((features, target, weight, bias), {"lam": torch.tensor(torch.nan)}, ValueError, "lam, ridge", -4),
        ((features, target, weight, bias), {"lam_diag": -torch.ones(shape[1])}, ValueError, "lam_diag", -4),
        ((features, target, weight, bias), {"sample_weight": at(torch.ones(shape[0]), 1, value=-1.0)},
         ValueError, "sample_weight must be finite and not negative", -5),
    ]  # fmt: skip
    for args, kwargs, error, message, code in cases:
        kwargs = {"lam": 0.5, **kwargs}
        args = [a.clone() for a in args]
        before = [a.clone() for a in args]
        with pytest.raises(error, match=rf"cfl_ops\.proximal_step: .*{message}"):
            cfl_ops.proximal_step_(*args, **kwargs)
        step, info = cfl_ops.proximal_step_ex(*args, **kwargs)
        assert int(info) == code
        assert torch.equal(step.weight.nan_to_num(9), before[2].nan_to_num(9))
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def test_a_bad_batch_element_spoils_no_other(backend: str) -> None:
    features, target, weight, bias = (t.expand(3, *t.shape).clone() for t in problem())
    features[1, 0, 0] = torch.nan
    step, info = cfl_ops.proximal_step_ex(features, target, weight, bias, lam=0.5)
    assert info.tolist() == [0, -1, 0]
    assert torch.equal(step.weight[1], weight[1])
    assert step.loss[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match=r"\(Batch element 1\): features has NaN or Inf in row 0"):
        cfl_ops.proximal_step(features, target, weight, bias, lam=0.5)


@pytest.mark.parametrize("lam", [0.5, torch.tensor([0.5, -1.0, 0.5])])
def test_a_bad_batch_element_spoils_no_derivative_of_what_all_share(lam, backend: str) -> None:
    features, target, weight, bias = problem()
    x = features.expand(3, *features.shape).clone()
    if not isinstance(lam, torch.Tensor):
        x[1, 0, 0] = torch.nan
    head = [weight.clone().requires_grad_(), bias.clone().requires_grad_(), target.clone().requires_grad_()]
    step, info = cfl_ops.proximal_step_ex(x, head[2], head[0], head[1], lam=lam)
    assert info[1] < 0
    got = torch.autograd.grad(step.weight.sum() + step.bias.square().sum() + step.loss[[0, 2]].sum(), head)
    alone = cfl_ops.proximal_step(features, head[2], head[0], head[1], lam=0.5)
    expected = torch.autograd.grad(2 * (alone.weight.sum() + alone.bias.square().sum() + alone.loss), head)
    own = [torch.ones_like(weight), 2 * bias, torch.zeros_like(target)]  # of the head that stays
    for a, b, c in zip(got, expected, own, strict=True):
        torch.testing.assert_close(a, b + c)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, "lam must be finite and not negative, but got -1.0"),
        ({"lam": float("nan")}, ValueError, "lam must be finite and not negative, but got nan"),
        ({"lam": "1"}, TypeError, "lam must be a number or a tensor, but got str"),
        ({"ridge": -2.0}, ValueError, "ridge must be finite and not negative"),
        ({"lam_diag": torch.ones(3)}, ValueError, "lam_diag must have size 9"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, but got 'avg'"),
        ({"fit_bias": "no"}, ValueError, "fit_bias must be one of penalized, free"),
        ({"method": "lu"}, ValueError, "method must be one of"),
        ({"features": torch.ones(9)}, ValueError, "features must have at least 2 dimensions"),
        ({"features": torch.ones(6, 8)}, ValueError, r"weight must have size 8 .*width of features"),
        ({"target": torch.ones(5, 3)}, ValueError, r"target must have size 6 .*rows of features"),
        ({"target": torch.ones(6, 4)}, ValueError, r"target must have size 3 .*rows of weight"),
        ({"target": torch.ones(6, 3, dtype=torch.int32)}, TypeError, "floating point, or int64"),
        ({"bias": torch.ones(4)}, ValueError, "bias must have size 3"),
        ({"weight": torch.ones(3, 9, dtype=torch.complex64)}, TypeError, "weight must be float16"),
        ({"target": torch.ones(6, 3, device="meta")}, ValueError, "target must be on the device of features"),
        ({"features": torch.ones(2, 6, 9)}, ValueError, r"weight must have the batch shape \(2,\)"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    features, target, weight, bias = problem()
    args = {"features": features, "target": target, "weight": weight, "bias": bias, "lam": 0.5, **change}
    with pytest.raises(error, match=rf"cfl_ops\.proximal_step_: .*{message}"):
        cfl_ops.proximal_step_(**args)


@pytest.mark.parametrize("form", ["proximal_step", "proximal_step_", "proximal_update"])
def test_bad_data_that_several_heads_share_is_named(form: str) -> None:
    features, target, weight, bias = problem(6, 9)
    heads = (weight.expand(2, *weight.shape).clone(), bias.expand(2, *bias.shape).clone())
    features[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"\(Batch element 0\): features has NaN or Inf in row 2"):
        getattr(cfl_ops, form)(features, target, *heads, lam=0.5)
    labels = torch.tensor([0, 0, 0, 0, 7, 0])
    with pytest.raises(IndexError, match=r"\(Batch element 0\): .*but got 7 in row 4"):
        getattr(cfl_ops, form)(features.nan_to_num(), labels, *heads, lam=0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(3, dtype=torch.int64)},
        {"bias": [0.0, 0.0, 0.0]},
        {"bias": torch.zeros(3, device="meta")},
        {"weight": torch.zeros(3, 20).to_sparse()},
        {"weight": torch.zeros(3, 20, device="meta")},
        {"weight": torch.zeros(3, 20, dtype=torch.int64)},
        {"target": torch.zeros(8, 3, dtype=torch.bool)},
        {"target": torch.zeros(8, dtype=torch.int64, device="meta")},
        {"target": torch.zeros(8)},
        {"target": None},
        {"features": torch.zeros(8, 20).to_sparse()},
        {"features": torch.zeros(20)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_quick_look_accepts_passes_all_checks(change) -> None:
    tensors = {"features": torch.randn(8, 20), "target": torch.randint(3, (8,)), "weight": torch.zeros(3, 20)}
    tensors["bias"] = torch.zeros(3)
    assert arguments._plain(**tensors)
    arguments._check_tensors("op", **tensors, lam_diag=None, sample_weight=None)
    tensors.update(change)
    assert not arguments._plain(**tensors)
    with pytest.raises((TypeError, ValueError), match=rf"cfl_ops\.op: {next(iter(change))} must "):
        arguments._check_tensors("op", **tensors, lam_diag=None, sample_weight=None)


def test_both_ops_compile_in_one_graph_and_equal_eager() -> None:
    def function(x, y, weight, bias, lam):
        m = cfl_ops.gram(x, weight.new_ones(x.shape[0], 1), bias_column=True)
        step = cfl_ops.proximal_step(x, y, weight, bias, lam=lam)
        return m.gram, m.count, *step

    args = (torch.randn(8, 20), torch.randint(3, (8,)), torch.randn(3, 20), torch.randn(3))
    compiled = torch.compile(function, fullgraph=True)
    for lam in (torch.tensor(0.5), torch.tensor(0.25)):
        for got, want in zip(compiled(*args, lam), function(*args, lam), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(IndexError, match="but got 9 in row 2"):
        compiled(args[0], torch.tensor([0, 0, 9, 0, 0, 0, 0, 0]), *args[2:], torch.tensor(0.5))


def test_a_schedule_of_numbers_does_not_recompile_for_each() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, y, w, lam: cfl_ops.proximal_step(x, y, w, lam=lam).weight, fullgraph=True, backend=counter
    )
    x, y, w, _ = problem()
    for step in range(6):
        compiled(x, y, w, 1.0 / (1 + step))
    assert counter.frame_count <= 2  # once for the first number, once for any number


def test_in_place_compiles() -> None:
    features, target, weight, bias = problem(dtype=torch.float32)
    other, other_bias = weight.clone(), bias.clone()
    compiled = torch.compile(lambda *a: cfl_ops.proximal_step_(*a, lam=0.5), fullgraph=True)
    got = compiled(features, target, weight, bias)
    want = cfl_ops.proximal_step_(features, target, other, other_bias, lam=0.5)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(weight, other)
    assert torch.equal(bias, other_bias)


def test_step_saves_with_weights_only() -> None:
    features, target, weight, bias = problem()
    step = cfl_ops.proximal_step(features, target, weight, bias, lam=0.5)
    buffer = io.BytesIO()
    torch.save(step, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True).weight, step.weight)


def test_func_grad_and_vmap_of_it() -> None:
    features, target, weight, _ = problem()

    def loss(f):
        return cfl_ops.proximal_step(f, target, weight, lam=0.5).loss

    leaf = features.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(features), leaf.grad)
    both = torch.vmap(torch.func.grad(loss))(torch.stack([features, 2 * features]))
    torch.testing.assert_close(both[0], leaf.grad)


def test_one_training_step_decreases_the_loss_as_theorem_5_3_says() -> None:
    """One closed-form step (nearly no penalty) gains at least (1 + CV^2) times the best gradient step."""
    features, target, weight, _ = problem(40, 8)

    def loss(w):
        return (target - features @ w.mT).square().sum() / 40

    new = cfl_ops.proximal_step(features, target, weight, lam=1e-12).weight
    gain = loss(weight) - loss(new)
    gradient = -2 / 40 * (target - features @ weight.mT).mT @ features
    u, sigma, _ = torch.linalg.svd(features, full_matrices=False)
    share = ((target - features @ weight.mT).mT @ u).square().sum(0)
    share = share / share.sum()
    mean = (share * sigma**2).sum()
    cv2 = (share * (sigma**2 - mean) ** 2).sum() / mean**2
    best = gradient.square().sum() / (2 / 40 * (features @ gradient.mT).square().sum())
    for size in (0.3 * best, best, 1.7 * best):
        assert loss(weight) - loss(weight - size * gradient) <= gain / (1 + cv2) + 1e-12


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [1.0, 1e-9])
def test_conjugate_gradients_agree_with_the_factorisation(shape, dtype, lam) -> None:
    """Where they converge (lam = 1) to their tolerance, else through the fallback; the loss is true."""
    features, target, weight, bias = problem(*shape, dtype=dtype)
    s = torch.rand(shape[0], dtype=dtype)
    args = (features, target, weight, bias)
    step = cfl_ops.proximal_step(*args, lam=lam, sample_weight=s, method="cg")
    want = cfl_ops.proximal_step(*args, lam=lam, sample_weight=s, method="cholesky")
    # Residual 1e-6 (1e-12) of the right side; the smallest eigenvalue is at least t = lam sum(s).
    tolerance = (1e-4 if dtype == torch.float32 else 1e-9) if lam == 1.0 else 5e-2
    if lam < 1 and dtype == torch.float64:
        tolerance = 1e-5
    assert (step.weight - want.weight).norm() <= tolerance * want.weight.norm()
    residual = target - F.linear(features, step.weight, step.bias)
    true = (s * residual.square().sum(-1)).sum() / s.sum()
    assert abs(step.loss - true) <= 1e-3 * true + 1e-9
    gradient = -2 / s.sum() * (s.unsqueeze(-1) * residual) @ step.weight
    assert (step.grad_features - gradient).norm() <= 1e-2 * gradient.norm() + 1e-5


def test_plan_tells_the_method() -> None:
    plan = cfl_ops.config.plan_proximal
    assert plan(32, 4096, 100)["side"] == "dual"
    assert plan(4096, 128, 100)["side"] == "primal"
    assert plan(1024, 1024, 100)["cg_iterations"] == 0
    assert plan(20000, 20000, 4)["cg_iterations"] >= 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "targets"), [(33, 100, 70), (128, 160, 5), (17, 400, 33)])
def test_triton_kernels_of_the_whole_head(rows: int, width: int, targets: int, dtype: torch.dtype) -> None:
    """Several panels, tiles and splits; the native op in float64 is the oracle."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    features, labels = torch.randn(2, rows, width).relu().to(dtype), torch.randint(targets, (2, rows))
    weight, bias = torch.randn(2, targets, width), torch.randn(2, targets)
    lam = torch.tensor([0.3, 1e-3], dtype=torch.float64)
    wide = (features.double(), labels, weight.double(), bias.double())
    want = cfl_ops.proximal_step(*wide, lam=lam, ridge=0.01)
    with cfl_ops.config.use_backend("triton"):
        got = cfl_ops.proximal_step(features, labels, weight, bias, lam=lam, ridge=0.01)
        held = weight.mT.contiguous().mT
        loss, grad = cfl_ops.proximal_step_(features, labels, held, bias.clone(), lam=lam, ridge=0.01)
    for value, expected in zip(got, want, strict=True):
        tolerance = 2.0**-7 if value.dtype == torch.bfloat16 else 1e-4
        scale = float(expected.abs().max())
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance * scale)
    assert torch.equal(held, got.weight)
    assert torch.equal(loss, got.loss)
    assert torch.equal(grad, got.grad_features)


def test_triton_leaves_the_head_as_it_was_where_a_step_fails() -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    features = torch.randn(3, 5, 9)
    features[1, 1] = features[1, 0]  # singular without a penalty
    features[2, 0, 0] = torch.nan
    weight = torch.randn(3, 2, 9)
    labels = torch.zeros(3, 5, dtype=torch.int64)
    with cfl_ops.config.use_backend("triton"):
        step, info = cfl_ops.proximal_step_ex(features, labels, weight, lam=0.0)
    assert info.tolist() == [0, 2, -1]
    assert torch.equal(step.weight[1:], weight[1:])
    assert not torch.equal(step.weight[0], weight[0])
    assert step.loss.isnan().tolist() == [False, True, True]
    assert not step.grad_features[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_and_a_free_bias_need_no_penalty(dtype, backend: str) -> None:
    """The row is its own mean: the bias meets it, and the weight stays."""
    features, target, weight, bias = problem(1, 3, dtype=dtype)
    for x in (features, torch.zeros_like(features)):
        step = cfl_ops.proximal_step(x, target, weight, bias, lam=0.0, fit_bias="free")
        assert torch.equal(step.weight, weight)
        torch.testing.assert_close(x @ step.weight.mT + step.bias, target)
