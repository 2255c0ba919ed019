"""RecursiveRidge against the batch solution, the Kalman filter of the paper, and its own past."""

from __future__ import annotations

from fractions import Fraction

import cfl_ops
import pytest
import torch
from torch import Tensor

F64 = torch.float64


def stream(rows: int, width: int, targets: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator, dtype=F64)
    truth = torch.randn(width, targets, generator=generator, dtype=F64)
    y = x @ truth + torch.randn(rows, targets, generator=generator, dtype=F64)
    return x.to(dtype), y.to(dtype)


def batch_ridge(x: Tensor, y: Tensor, alpha: float = 1.0, weight: Tensor | None = None) -> Tensor:
    x, y = x.double(), y.double()
    left = x if weight is None else x * weight.double().unsqueeze(-1)
    return torch.linalg.solve(left.mT @ x + alpha * torch.eye(x.shape[1], dtype=F64), left.mT @ y).mT


def exact_inverse(x: Tensor, alpha: Fraction, weight: list[Fraction]) -> tuple[list[list[Fraction]], Tensor]:
    """``(X^T S X + alpha I)^-1`` of the stored numbers as fractions, and in float64."""
    rows, order = [[Fraction(v) for v in row] for row in x.tolist()], x.shape[1]
    left = [
        [
            sum((s * r[i] * r[j] for s, r in zip(weight, rows, strict=True)), alpha * (i == j))
            for j in range(order)
        ]
        + [Fraction(int(i == j)) for j in range(order)]
        for i in range(order)
    ]
    for j in range(order):
        left[j] = [v / left[j][j] for v in left[j]]
        for i in range(order):
            if i != j:
                left[i] = [v - left[i][j] * u for v, u in zip(left[i], left[j], strict=True)]
    inverse = [row[order:] for row in left]
    return inverse, torch.tensor([[float(v) for v in row] for row in inverse], dtype=F64)


def exact_ridge(
    x: Tensor, y: Tensor, alpha: float | Fraction = 1.0, weight: list[Fraction] | None = None
) -> Tensor:
    """The ridge solution of the stored numbers ``(K, D)``, without an error."""
    weight = weight or [Fraction(1)] * len(x)
    inverse, _ = exact_inverse(x, Fraction(alpha), weight)
    rows, targets = x.tolist(), y.tolist()
    out = []
    for k in range(y.shape[1]):
        right = [
            sum(s * Fraction(r[i]) * Fraction(t[k]) for s, r, t in zip(weight, rows, targets, strict=True))
            for i in range(x.shape[1])
        ]
        out.append([float(sum(a * b for a, b in zip(row, right, strict=True))) for row in inverse])
    return torch.tensor(out, dtype=F64)


def assert_within_bound(model: cfl_ops.RecursiveRidge, x: Tensor, y: Tensor, alpha: float = 1.0) -> None:
    """W within the bound of the docstring, of the features scaled to one length: a QR does not see their scale."""
    want = exact_ridge(x, y, alpha)
    x, y = x.double(), y.double()
    whole = torch.cat((x, alpha**0.5 * torch.eye(x.shape[1], dtype=F64)))
    length = whole.norm(dim=0)
    values = torch.linalg.svdvals(whole / length)
    condition = float(values[0] / values[-1])
    rest = torch.cat((y - x @ want.mT, -(alpha**0.5) * want.mT)).norm()
    size = (want * length).norm() + condition * rest / values[0]
    bound = (8 + len(x) ** 0.5) * torch.finfo(model.factor.dtype).eps * condition * size
    assert float(((model.wide_weight - want) * length).norm()) <= float(bound)


SCALES = {
    "far above the prior": (torch.ones(5, dtype=F64) * 1e6, 0.0, 1e-8),
    "far below": (torch.ones(5, dtype=F64) * 1e-6, 0.0, 1.0),
    "graded": (torch.logspace(-6, 6, 5, dtype=F64), 0.0, 1e-8),
    "graded and flat": (torch.logspace(6, -6, 5, dtype=F64), 0.0, 1e8),
    "mean 1e3": (torch.ones(5, dtype=F64), 1e3, 1.0),
    "mean 1e6": (torch.ones(5, dtype=F64), 1e6, 1e-8),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rows", [1, 3, 5, 50])
@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_any_scale(dtype: torch.dtype, rows: int, scale: str) -> None:
    factor, mean, alpha = SCALES[scale]
    x, y = stream(rows, 5)
    x, y = (x * factor + mean).to(dtype), (y / 10).to(dtype)
    for block in (1, 7, rows):
        model = cfl_ops.RecursiveRidge(5, 2, alpha=alpha, dtype=dtype)
        for begin in range(0, rows, block):
            model.update(x[begin : begin + block], y[begin : begin + block])
        assert_within_bound(model, x, y, alpha)
        # The variances, by a triangular solve with the same factor.
        eps, inverse = torch.finfo(dtype).eps, exact_inverse(x, Fraction(alpha), [Fraction(1)] * rows)[1]
        unit = inverse.diagonal().sqrt()
        condition = torch.linalg.cond(inverse / unit / unit.unsqueeze(-1)).sqrt()
        assert ((model.covariance.double() - inverse) / unit / unit.unsqueeze(-1)).abs().max() <= (
            (32 + 4 * rows**0.5) * eps * condition
        )
        _, variance = model.predict(torch.diag(1 / unit), return_variance=True)
        torch.testing.assert_close(
            variance,
            torch.full((5,), 2.0, dtype=F64),
            rtol=0,
            atol=float((32 + 4 * rows**0.5) * eps * condition),
        )


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (F64, 1e9)])
def test_features_far_larger_than_the_prior(dtype: torch.dtype, scale: float) -> None:
    """Row by row it was 1e10 off, where one block of all rows was right."""
    x, _ = stream(200, 20, 1)
    x = (x * scale).to(dtype)
    y = (x.double() @ torch.ones(20, 1, dtype=F64) / scale).to(dtype)
    model = cfl_ops.RecursiveRidge(20, 1, dtype=dtype)
    for i in range(200):
        model.update(x[i], y[i])
    assert relative(model.weight * scale, torch.ones(1, 20, dtype=F64)) <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("order", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_that_grow_or_shrink(dtype: torch.dtype, order: float) -> None:
    """Weak rows say little that lasts, before strong ones and after."""
    x, y = stream(24, 4)
    size = 10 ** (order * torch.linspace(-6, 6, 24, dtype=F64)).unsqueeze(-1)
    x, y = (x * size).to(dtype), (y * size).to(dtype)
    model = cfl_ops.RecursiveRidge(4, 2, alpha=1e-8, dtype=dtype)
    for i in range(24):
        model.update(x[i], y[i])
    assert_within_bound(model, x, y, 1e-8)


@pytest.fixture(params=[False, True], ids=["denormal numbers", "flushed"])
def flushed(request: pytest.FixtureRequest):
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormal numbers")
    yield
    torch.set_flush_denormal(False)


SILENCES = [(4000, 0.9), (1500, 0.998), (1500, 0.9), pytest.param(100_000, 0.9, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("idle", "forgetting"), SILENCES)
def test_silence_ends_at_a_floor(flushed: None, dtype: torch.dtype, idle: int, forgetting: float) -> None:
    """W stays, no pivot sinks below eps alpha, and what comes later is learnt as from a prior at that W."""
    eps, alpha = torch.finfo(dtype).eps, 2.0
    x, y = stream(60, 5, dtype=dtype)
    model = cfl_ops.RecursiveRidge(5, 2, alpha=alpha, forgetting=forgetting, dtype=dtype)
    for i in range(30):
        model.update(x[i], y[i])
    before, sank = model.wide_weight.clone(), model.factor.diagonal().clone()
    nothing = torch.zeros(1, 5, dtype=dtype), torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=dtype)
    for i in range(idle):
        model.update(*nothing[: 2 + i % 2])
    assert relative(model.wide_weight, before) <= 8 * eps * idle**0.5
    pivots = model.factor.diagonal()
    least = (eps * alpha) ** 0.5
    assert (pivots >= least * (1 - 4 * eps)).all()
    if forgetting == 0.9:
        torch.testing.assert_close(model.factor, torch.eye(5, dtype=dtype) * pivots, rtol=0, atol=0)
        torch.testing.assert_close(pivots, torch.full((5,), least, dtype=dtype), rtol=4 * eps, atol=0)
    else:
        decay = forgetting ** (idle / 2)
        torch.testing.assert_close(pivots, sank * decay, rtol=eps * idle, atol=0)
    state = model.factor.clone().double()
    for i in range(30, 60):
        model.update(x[i], y[i])
        if i in (31, 59):
            count = i - 29
            # What was there, faded, as D rows that W fits; and the new ones.
            rows = torch.cat((state.mT * forgetting ** (count / 2), x[30 : i + 1].double()))
            targets = torch.cat((rows[:5] @ before.mT, y[30 : i + 1].double()))
            age = [Fraction(1)] * 5 + [Fraction(forgetting) ** (count - 1 - n) for n in range(count)]
            want = exact_ridge(rows, targets, 0.0, age)
            scaled = rows * torch.tensor([float(a) ** 0.5 for a in age], dtype=F64).unsqueeze(-1)
            bound = 16 * eps * float(torch.linalg.cond(scaled)) * idle**0.25
            if count > 5 or forgetting > 0.9:
                assert relative(model.wide_weight, want) <= bound
            else:  # two rows are fitted; the floor, which holds where the formula fades, says how the rest moves
                fitted = x[30 : i + 1].double() @ model.wide_weight.mT
                torch.testing.assert_close(fitted, y[30 : i + 1].double(), rtol=0, atol=bound)
                assert relative(model.wide_weight, want) <= 0.01


def test_silence_in_some_directions_does_not_wind_up() -> None:
    """A one-hot code beside a constant: one direction is never seen, and the weights along it ran away."""
    for dtype in (torch.float32, F64):
        model = cfl_ops.RecursiveRidge(6, 1, forgetting=0.9, dtype=dtype)
        noise = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = torch.cat((torch.ones(5, 1), torch.eye(5)), -1).to(dtype)
        for i in range(3000):
            model.update(x[i % 5], 1 + 0.1 * noise[i : i + 1])
        assert model.weight.abs().max() < 10
        x, _ = stream(400, 6, 1, dtype)
        for row in x:
            model.update(row, row.sum(0, keepdim=True))
        assert relative(model.weight, torch.ones(1, 6, dtype=F64)) <= 20 * torch.finfo(dtype).eps


OUTLIERS = [(torch.float32, 300.0), (torch.float32, 1e8), (F64, 1e3), (F64, 1e6), (F64, 1e12)]


@pytest.mark.parametrize(("dtype", "scale"), OUTLIERS)
@pytest.mark.parametrize("block", [1, 3])
def test_a_window_forgets_outliers(dtype: torch.dtype, scale: float, block: int) -> None:
    x, y = stream(45, 5)
    for place, size in ((12, scale), (15, scale**0.5)):
        x[place], y[place] = x[place] * size, y[place] * size
    x, y = x.to(dtype), y.to(dtype)
    model = cfl_ops.RecursiveRidge(5, 2, window=10, dtype=dtype)
    for i in range(0, 45, block):
        model.update(x[i : i + block], y[i : i + block])
        if i >= 26:
            last = slice(i + block - 10, i + block)
            figure = torch.finfo(dtype).eps ** 0.75
            assert relative(model.wide_weight, exact_ridge(x[last], y[last])) <= 10 * figure


@pytest.mark.parametrize(("dtype", "base"), [(torch.float32, 0.5), (F64, 0.5), (F64, 0.1)])
def test_a_window_over_rows_that_fade(dtype: torch.dtype, base: float) -> None:
    """Each row that leaves is larger than all that stay: z sinks to the rounding of what it was, L does not."""
    x, y = stream(40, 4)
    size = base ** torch.arange(40, dtype=F64).unsqueeze(-1)
    x, y = (x * size).to(dtype), (y * size).to(dtype)
    model = cfl_ops.RecursiveRidge(4, 2, window=8, dtype=dtype)
    for i in range(40):
        model.update(x[i], y[i])
        if i % 5 == 0:
            last = slice(max(0, i - 7), i + 1)
            assert (
                relative(model.wide_weight, exact_ridge(x[last], y[last]))
                <= 20 * torch.finfo(dtype).eps ** 0.75
            )


def test_a_window_is_not_rebuilt_at_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    rebuild = cfl_ops.RecursiveRidge._rebuild
    monkeypatch.setattr(cfl_ops.RecursiveRidge, "_rebuild", lambda self: (times.append(1), rebuild(self))[1])
    x, y = stream(2000, 4, dtype=torch.float32)
    model = cfl_ops.RecursiveRidge(4, 2, window=100, dtype=torch.float32)
    for i in range(2000):
        model.update(x[i], y[i])
    assert 1 <= len(times) <= 15


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_removal_that_costs_half_of_the_digits_is_refused(dtype: torch.dtype) -> None:
    x, y = stream(12, 4, dtype=dtype)
    model = cfl_ops.RecursiveRidge(4, 2, dtype=dtype)
    x[5] *= 1e3 if dtype == torch.float32 else 1e6
    model.update(x, y)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"half of the digits would be lost|no positive definite"
    ):
        model.remove(x[5], y[5])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.remove(x[6:], y[6:])
    assert_within_bound(model, x[:6], y[:6])


PROCESSES = [(1e-3, 1e6, 10.0, 0.9), (1e4, 1e-8, 10.0, 1.0), (1.0, 1e6, 1e-12, 0.9), (1.0, 1e-8, 1e-3, 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("scale", "alpha", "noise", "forgetting"), PROCESSES)
def test_a_random_walk_on_any_scale(
    dtype, scale: float, alpha: float, noise: float, forgetting: float
) -> None:
    """The filter in covariance form, in fractions."""
    x, y = stream(12, 3, 1)
    x, y = (x * scale).to(dtype), y.to(dtype)
    model = cfl_ops.RecursiveRidge(3, 1, alpha=alpha, process_noise=noise, forgetting=forgetting, dtype=dtype)
    P = [[Fraction(int(i == j)) / Fraction(alpha) for j in range(3)] for i in range(3)]
    W = [Fraction(0)] * 3
    for row, target in zip(x, y, strict=True):
        model.update(row, target)
        phi = [Fraction(v) for v in row.tolist()]
        P = [
            [P[i][j] / Fraction(forgetting) + Fraction(noise) * (i == j) for j in range(3)] for i in range(3)
        ]
        side = [sum(P[i][j] * phi[j] for j in range(3)) for i in range(3)]
        gain = [v / (sum(a * b for a, b in zip(side, phi, strict=True)) + 1) for v in side]
        error = Fraction(target.item()) - sum(a * b for a, b in zip(W, phi, strict=True))
        W = [w + g * error for w, g in zip(W, gain, strict=True)]
        P = [[P[i][j] - gain[i] * side[j] for j in range(3)] for i in range(3)]
    want, weight = (torch.tensor([[float(v) for v in row] for row in m], dtype=F64) for m in (P, [W]))
    unit = want.diagonal().sqrt()
    condition = float(torch.linalg.cond(want / unit / unit.unsqueeze(-1))) ** 0.5
    bound = 12 * 8 * torch.finfo(dtype).eps * condition
    assert (
        relative(model.covariance.double() / unit / unit.unsqueeze(-1), want / unit / unit.unsqueeze(-1))
        <= bound
    )
    assert relative(model.wide_weight / unit, weight / unit) <= bound


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
def test_equals_batch_ridge(dtype, bound, block: int) -> None:
    """The asked bounds, on a short stream; the long one is the slow test below."""
    x, y = stream(3000, 12, dtype=dtype)
    model = cfl_ops.RecursiveRidge(12, 2, alpha=0.5, dtype=dtype)
    for begin in range(0, 3000, block):
        model.update(x[begin : begin + block], y[begin : begin + block])
    assert relative(model.weight, batch_ridge(x, y, 0.5)) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
def test_long_stream(dtype, bound, window: int | None) -> None:
    """10^6 updates, or 10^5 steps of a window, each with its downdate."""
    rows = 1_000_000 if window is None else 100_000
    x, y = stream(rows, 16, dtype=dtype)
    model = cfl_ops.RecursiveRidge(16, 2, window=window, dtype=dtype)
    for i in range(rows):
        model.update(x[i : i + 1], y[i : i + 1])
    last = slice(-(window or rows), None)
    assert relative(model.weight, batch_ridge(x[last], y[last])) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
@pytest.mark.parametrize("block", [1, 5, 90])
def test_window(dtype, bound, block: int) -> None:
    x, y = stream(1200, 9, dtype=dtype)
    model = cfl_ops.RecursiveRidge(9, 2, window=64, dtype=dtype)
    for begin in range(0, 1200, block):
        seen = min(begin + block, 1200)
        model.update(x[begin:seen], y[begin:seen])
        if begin % 30 == 0:
            last = slice(max(0, seen - 64), seen)
            assert relative(model.weight, batch_ridge(x[last], y[last])) <= bound


def test_window_survives_an_outlier_that_drowns_the_rest() -> None:
    """Its downdate leaves only rounding: the state is then rebuilt from the rows of the window."""
    x, y = stream(60, 4, dtype=torch.float32)
    x[20] *= 1e8
    model = cfl_ops.RecursiveRidge(4, 2, window=10, dtype=torch.float32)
    for i in range(60):
        model.update(x[i], y[i])
    assert relative(model.weight, batch_ridge(x[-10:], y[-10:])) <= 1e-4


def test_forgetting_and_weights() -> None:
    x, y = stream(40, 5)
    weight = torch.rand(40, dtype=F64)
    model = cfl_ops.RecursiveRidge(5, 2, alpha=2.0, forgetting=0.9)
    for i in range(40):
        model.update(x[i : i + 1], y[i : i + 1], weight[i : i + 1])
    age = 0.9 ** torch.arange(39, -1, -1, dtype=F64)
    assert relative(model.weight, batch_ridge(x, y, 2.0 * 0.9**40, weight * age)) <= 1e-12


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_is_the_kalman_filter(forgetting: float) -> None:
    """Formulas section 5, in covariance form: predict, gain, update."""
    x, y = stream(60, 4)
    noise, q2, alpha = 0.3, 0.02, 1.5
    model = cfl_ops.RecursiveRidge(4, 2, alpha=alpha, noise=noise, process_noise=q2, forgetting=forgetting)
    eye = torch.eye(4, dtype=F64)
    P, W = noise / alpha * eye, torch.zeros(2, 4, dtype=F64)
    for begin in range(0, 60, 3):
        phi, target = x[begin : begin + 3], y[begin : begin + 3]
        P = P / forgetting + q2 * eye
        gain = P @ phi.mT @ torch.linalg.inv(phi @ P @ phi.mT + noise * torch.eye(3, dtype=F64))
        error = target - phi @ W.mT
        W = W + error.mT @ gain.mT
        P = P - gain @ phi @ P
        torch.testing.assert_close(model.update(phi, target), error, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.weight, W, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.covariance, P, rtol=0, atol=1e-10)
    mean, variance = model.predict(x, return_variance=True)
    torch.testing.assert_close(mean, x @ W.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(variance, (x @ P * x).sum(-1) + noise, rtol=0, atol=1e-10)


def test_missing_rows_teach_nothing() -> None:
    x, y = stream(8, 3)
    x[2], y[5] = torch.nan, torch.inf
    weight = torch.ones(8, dtype=F64)
    weight[[2, 5]] = 0
    model = cfl_ops.RecursiveRidge(3, 2)
    error = model.update(x, y, weight)
    keep = weight > 0
    assert relative(model.weight, batch_ridge(x[keep], y[keep])) <= 1e-12
    assert (error[~keep] == 0).all()


def test_remove_undoes_update_and_refuses_the_impossible() -> None:
    x, y = stream(30, 4)
    model = cfl_ops.RecursiveRidge(4, 2)
    model.update(x, y)
    model.remove(x[:12], y[:12])
    assert relative(model.weight, batch_ridge(x[12:], y[12:])) <= 1e-11
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(torch.linalg.LinAlgError):
        model.remove(100 * x, y)
    with pytest.raises(ValueError, match="x has NaN or Inf in row 1"):
        model.update(x[:2] * torch.tensor([[1.0], [torch.nan]]), y[:2])
    with pytest.raises(ValueError, match="y has NaN or Inf in row 0"):
        model.update(x[:2], y[:2] * torch.inf)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_states_of_before_z_was_kept_load() -> None:
    """They have W instead, and no record of what downdates left: the window is computed anew at the next chance."""
    for options in ({"window": 16}, {"forgetting": 0.9}):
        x, y = stream(50, 4)
        want, got = (cfl_ops.RecursiveRidge(4, 2, alpha=0.5, **options) for _ in range(2))
        want.update(x[:30], y[:30])
        old = {key: want.state_dict()[key] for key in ("factor", "window_rows", "seen")}
        parent = torch.nn.Sequential(got)
        parent.load_state_dict(
            {f"0.{key}": value for key, value in {**old, "wide_weight": want.wide_weight}.items()}
        )
        torch.testing.assert_close(got.wide_weight, want.wide_weight, rtol=1e-12, atol=0)
        for model in (got, want):
            model.update(x[30:32], y[30:32])
        torch.testing.assert_close(got.wide_weight, want.wide_weight, rtol=1e-12, atol=0)
        assert got.downdated.isfinite().all()


def test_a_state_of_another_alpha_is_refused() -> None:
    model, other = cfl_ops.RecursiveRidge(3, 1, alpha=2.0), cfl_ops.RecursiveRidge(3, 1, alpha=3.0, noise=2.0)
    with pytest.raises(RuntimeError, match=r"prior: the state was made with alpha=2\.0, not 3\.0"):
        other.load_state_dict(model.state_dict())
    assert float(other.prior) == 3
    cfl_ops.RecursiveRidge(3, 1, alpha=2.0, noise=2.0).load_state_dict(model.state_dict())


def test_the_weight_of_states_that_share_no_time_but_an_address() -> None:
    """The memory of a state that is gone is used by the next, of the same version: its weight was served again."""
    model, x = cfl_ops.RecursiveRidge(64, 1), torch.randn(3, 64, dtype=torch.float64)
    for _ in range(50):
        factor = torch.eye(64, dtype=torch.float64) * (1 + torch.rand((), dtype=torch.float64))
        side = torch.randn(1, 64, dtype=torch.float64)
        want = x @ side.mT / factor[0, 0]
        got = torch.func.functional_call(model, {"factor": factor, "rotated_targets": side}, (x,))
        torch.testing.assert_close(got, want)
        model.factor, model.rotated_targets = factor.clone(), side.clone()
        torch.testing.assert_close(model(x), want)
        del factor, side


def test_remove_with_forgetting_asks_what_is_left() -> None:
    x, y = stream(60, 4)
    model, without = (cfl_ops.RecursiveRidge(4, 2, forgetting=0.97) for _ in range(2))
    for i in range(60):
        model.update(x[i], y[i])
        without.update(x[i], y[i], torch.tensor([float(i != 3)]))
    with pytest.raises(ValueError, match=r"sample_weight must say what is left of each row, 0\.97 \*\* n"):
        model.remove(x[3], y[3])
    model.remove(x[3], y[3], torch.tensor([0.97**56], dtype=torch.float64))
    assert relative(model.weight, without.weight) <= 1e-12
    with pytest.raises(RuntimeError, match="process noise has blurred"):
        cfl_ops.RecursiveRidge(4, 2, process_noise=0.1).remove(x[:1], y[:1])


def test_the_weight_is_that_of_the_state() -> None:
    """It is solved for when it is asked for, and kept until the state changes, in whatever way."""
    x, y = stream(40, 4)
    model = cfl_ops.RecursiveRidge(4, 2)
    model.update(x[:20], y[:20])
    assert model._weight() is model._weight()
    model.weight.zero_()
    model.wide_weight.zero_()
    assert relative(model.weight, batch_ridge(x[:20], y[:20])) <= 1e-12
    other = cfl_ops.RecursiveRidge(4, 2)
    assert not other.weight.any()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.weight, model.weight)
    torch.compile(lambda: other.update(x[20:], y[20:]), fullgraph=True, backend="aot_eager")()
    assert relative(other.weight, batch_ridge(x, y)) <= 1e-12
    state = {key: value.clone() for key, value in other.state_dict().items()}
    out = torch.func.functional_call(model, state, (x,))
    assert torch.equal(out, other(x))
    with torch.no_grad():
        model.rotated_targets.mul_(2)
    assert relative(model.weight, 2 * batch_ridge(x[:20], y[:20])) <= 1e-12


def test_rows_that_overflow_are_refused() -> None:
    x, y = stream(4, 3)
    model = cfl_ops.RecursiveRidge(3, 2, dtype=torch.float32)
    model.update(x, y)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="x has NaN or Inf in row 2"):
        model.update(x * torch.tensor([[1.0], [1.0], [1e60], [1.0]]), y)
    with pytest.raises(ValueError, match=r"too large for torch\.float32"):
        model.update(x, y, torch.full((4,), 1e90, dtype=F64))
    with pytest.raises(ValueError, match=r"too large for torch\.float32"):
        model.update(torch.full((4, 3), 3e38), y)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_checkpoints_and_bad_arguments() -> None:
    x, y = stream(50, 4, dtype=torch.float32)
    model = cfl_ops.RecursiveRidge(4, 2, window=16, dtype=torch.float32)
    model.update(x[:30], y[:30])
    other = cfl_ops.RecursiveRidge(4, 2, window=16, dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one.update(x[30:], y[30:])
    assert torch.equal(model.weight, other.weight)
    assert other(x).shape == (50, 2)
    for wrong in ({"alpha": 0.0}, {"noise": -1.0}, {"forgetting": 1.5}, {"window": 0},
                  {"window": 3, "forgetting": 0.9}, {"process_noise": float("nan")}):  # fmt: skip
        with pytest.raises(ValueError, match="RecursiveRidge"):
            cfl_ops.RecursiveRidge(3, 1, **wrong)
    with pytest.raises(ValueError, match="x must have size 4"):
        model.update(x[:, :3], y)
    with pytest.raises(ValueError, match="sample_weight"):
        model.update(x, y, -torch.ones(50))
    assert cfl_ops.RecursiveRidge(0, 2).update(torch.zeros(3, 0), torch.ones(3, 2)).shape == (3, 2)
    assert model.update(x[:0], y[:0]).shape == (0, 2)


@pytest.mark.parametrize("where", ["native", "python"])
@pytest.mark.parametrize("block", [1, 2, 10])
@pytest.mark.parametrize("scale", [1e4, 1e7])
@pytest.mark.parametrize("features", [20, 150])
def test_few_rows_far_larger_than_the_prior(scale: float, block: int, features: int, where: str) -> None:
    """Where they say nothing the prior must be left: block reflectors in float32 left their rounding (260 % off)."""
    x, y = torch.randn(10, features) * scale, torch.randn(10, 2)
    model = cfl_ops.RecursiveRidge(features, 2, dtype=torch.float32)
    with cfl_ops.config.use_backend(where):
        for begin in range(0, 10, block):
            model.update(x[begin : begin + block], y[begin : begin + block])
    system = x.double() @ x.double().mT + torch.eye(10, dtype=F64)
    assert relative(model.weight, torch.linalg.solve(system, y.double()).mT @ x.double()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_long_columns_leave_small_pivots_their_digits(rank: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and rank > 1:
        pytest.skip("GPU kernels take the columns of a block at once: benches/results/STATUS.md")
    order, eps = 12, torch.finfo(dtype).eps
    long = torch.randn(order, rank, dtype=dtype) * (1e6 if dtype == torch.float32 else 1e13)
    factor = cfl_ops.cholesky_update(torch.eye(order, dtype=dtype), long)
    # The columns leave order - rank directions alone: (I + V V^T)^-1 is the projection on them, and hardly more.
    basis = torch.linalg.qr(long.double())[0]
    inverse = torch.linalg.inv(factor.double())
    want = torch.eye(order, dtype=F64) - basis @ basis.mT
    assert float((inverse.mT @ inverse - want).norm()) <= 100 * order * eps
