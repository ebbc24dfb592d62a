"""Each op against its reference in float64, on this machine: a wrong build shows in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook import ops

_ROWS, _TOKENS, _FEW_TOKENS, _IN, _OUT, _KEYS, _RANK = 3, 37, 20, 130, 71, 9, 5
_APART = "membership with cues of two tokens"
_DTYPES = (torch.float32, torch.bfloat16)
# Relative Frobenius errors. 16-bit results are rounded once to 8 bits of mantissa (2^-9 each, less
# in the mean); float32 sums of 130 terms stay far below the first line.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}

Case = Callable[[torch.device, torch.dtype, str], list[Tensor]]


@dataclass(frozen=True)
class Check:
    """One op, case, implementation and dtype.

    Args:
        op: public name of the op.
        case: which of its forms.
        backend: the implementation.
        device: where it ran.
        dtype: dtype of the input.
        error: largest relative error of its outputs against the float64 reference, None where the
            op raised.
        tolerance: the largest error allowed.
        message: the error it raised, if it did.
    """

    op: str
    case: str
    backend: str
    device: str
    dtype: str
    error: float | None
    tolerance: float
    message: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the implementation is right."""
        return self.error is not None and self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "ok": self.ok}


def selftest() -> list[Check]:
    """Runs every op in every implementation that is available here."""
    return list(_checks())


def _checks() -> Iterator[Check]:
    for op, cases in _CASES.items():
        for backend, (available, _) in ops.available_backends(op).items():
            if not available:
                continue
            device = torch.device("cuda" if backend in ("triton", "cuda") else "cpu")
            for name, case in cases.items():
                for dtype in _DTYPES if op in _SIXTEEN_BIT else (torch.float32,):
                    yield _check(op, name, case, backend, device, dtype)


def _check(
    op: str, name: str, case: Case, backend: str, device: torch.device, dtype: torch.dtype
) -> Check:
    expected = case(torch.device("cpu"), torch.float64, "reference")
    tolerance = _TOLERANCE[dtype]
    labels = (op, name, backend, str(device), str(dtype).removeprefix("torch."))
    try:
        found = case(device, dtype, backend)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        return Check(*labels, None, tolerance, f"{type(error).__name__}: {error}")
    errors = [_error(a.cpu(), b) for a, b in zip(found, expected, strict=True)]
    return Check(*labels, max(errors), tolerance)


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    # NaN where z is undefined, -inf where no edit is armed: these have to be the same.
    if found.shape != expected.shape or not torch.equal(
        found.masked_fill(found.isfinite(), 0).nan_to_num(1, 2, 3),
        expected.masked_fill(finite, 0).nan_to_num(1, 2, 3),
    ):
        return float("inf")
    difference = (found - expected)[finite]
    return float(difference.norm() / expected[finite].norm().clamp_min(1e-300))


def _random(seed: int, *shape: int) -> Tensor:
    """Values that bfloat16 holds exactly, so that every dtype gets the same input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().double()


def _hooked(scope: str, form: str, tokens: int = _TOKENS) -> Case:
    def case(device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = _random(0, _ROWS, tokens, _IN)
        x[:, 11] *= 8  # one outlier, so that the gate is far from a tie
        mask = torch.ones(_ROWS, tokens, dtype=torch.bool)
        mask[1, tokens - 7 :] = False
        q = torch.linalg.qr(_random(1, _OUT, _RANK))[0]
        s = _random(2, _RANK, _IN)
        delta: Any = {"dense": q @ s, "factored": (q, s), "pair": (q, s)}[form]
        if isinstance(delta, tuple):
            delta = tuple(part.to(device, wide) for part in delta)
        else:
            delta = delta.to(device, wide)
        scopes: dict[str, ops.Scope] = {
            "sequence": ops.Sequence(),
            "prefix": ops.Prefix(),
            "population": ops.Population(25.0, 8.0),
            "membership": ops.Membership(),
            "membership with cues": ops.Membership(
                correction="own",
                cues=_random(9, _RANK, _IN).to(device, wide),
                limits=torch.tensor([30.0, 25.0, 30.0, 35.0, torch.inf]).to(device),
            ),
            _APART: ops.Membership(
                correction="own",
                cues=_random(9, _RANK, _IN).to(device, wide),
                limits=torch.tensor([2.75, 5.0, 2.75, 3.75, 3.0]).to(device),
                reaches=torch.tensor([3, 4, 5, 60, 2], dtype=torch.int32).to(device),
                gaps=torch.tensor([1, 3, 7, 3, 0], dtype=torch.int32).to(device),
            ),
        }
        alpha = {"membership": 60.0, "membership with cues": 60.0, _APART: 15.0}.get(scope, 2.2)
        y, z = ops.hooked_linear(
            x.to(device, dtype),
            _random(3, _OUT, _IN).to(device, dtype),
            _random(4, _OUT).to(device, dtype),
            delta,
            alpha,
            mask=mask.to(device),
            scope=scopes[scope],
            backend=backend,
        )
        return [y, z]

    return case


def _factor() -> Tensor:
    keys = _random(5, _IN, 3 * _IN)
    return torch.linalg.cholesky(keys @ keys.T / _IN)


def _cholesky(op: str) -> Case:
    def case(device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        keys = _random(6, _IN, _KEYS) / 4
        factor = _factor()
        if op == "cholesky_downdate_":
            factor = torch.linalg.cholesky(factor @ factor.T + keys @ keys.T)
        factor = factor.to(device, dtype)
        solved = getattr(ops, op)(factor, keys.to(device, dtype), backend=backend)
        return [factor.tril()] if solved is None else [factor.tril(), solved]

    return case


def _gram(device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gram = _random(7, _IN, _IN).to(device, wide)
    gram = gram + gram.T
    x = _random(8, _ROWS, _TOKENS, _IN).to(device, dtype)
    mask = torch.ones(_ROWS, _TOKENS, dtype=torch.bool, device=device)
    mask[2, 5:] = False
    ops.gram_update_(gram, x, mask=mask, backend=backend)
    return [gram]


_CASES: dict[str, dict[str, Case]] = {
    "hooked_linear": {
        **{
            f"{scope}, {form}": _hooked(scope, form)
            for scope in ("sequence", "prefix", "population")
            for form in ("dense", "factored")
        },
        "membership, pair": _hooked("membership", "pair"),
        "membership with cues, pair": _hooked("membership with cues", "pair"),
        # Few enough tokens for the kernels of decoding.
        f"{_APART}, pair": _hooked(_APART, "pair", _FEW_TOKENS),
    },
    "cholesky_update_": {"update": _cholesky("cholesky_update_")},
    "cholesky_downdate_": {"downdate": _cholesky("cholesky_downdate_")},
    "cholesky_update_solve_": {"update and solve": _cholesky("cholesky_update_solve_")},
    "gram_update_": {"masked": _gram},
}
_SIXTEEN_BIT = ("hooked_linear", "gram_update_")
