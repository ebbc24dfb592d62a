"""The one table of tolerances: what rounding alone explains, per quantity and dtype.

``torch.testing.assert_close(actual, expected, **tol("output", dtype, reduction=n, scale=s))``

A sum of ``reduction`` products rounded in ``eps`` has a random-walk error of about
``eps * sqrt(reduction)`` times the size of its terms; every bound below is that, times ``_SLACK``
for the tail of the walk and for other orders of summation. ``expected`` is meant to be computed in
float64 from the same (already rounded) inputs. A test that needs more says why beside the number.
"""

from __future__ import annotations

import math

import torch

_SLACK = 8.0


def compute_eps(dtype: torch.dtype) -> float:
    """Unit of rounding of what products are formed in: float64 for float64, else float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _output(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # Products in the compute dtype, then at most two roundings to the dtype of the model (frozen
    # output, sum), each relative to the frozen output, which may be larger than the sum.
    eps = torch.finfo(dtype).eps
    return eps, scale * (eps + _SLACK * compute_eps(dtype) * math.sqrt(reduction))


def _score(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # scale = M / std: the relative error of a norm grows by it in (M - mean) / std.
    # z is handed out in float32 whatever the dtype.
    eps = torch.finfo(torch.float32).eps
    return eps, _SLACK * compute_eps(dtype) * math.sqrt(reduction) * scale + eps


def _statistic(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # A mean or standard deviation of norms: the norms are rounded, the statistics are float64.
    return 0.0, _SLACK * compute_eps(dtype) * math.sqrt(reduction) * scale


def _factor(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # Backward error of L L^T: the factor update is stable, its error does not see the condition.
    eps = torch.finfo(dtype).eps
    return 0.0, _SLACK * eps * math.sqrt(reduction) * scale


def _solve(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # scale = condition number times the size of the solution: forward error of a stable solve.
    eps = torch.finfo(dtype).eps
    return 0.0, _SLACK * eps * math.sqrt(reduction) * scale


def _gram(dtype: torch.dtype, reduction: int, scale: float) -> tuple[float, float]:
    # A sum over tokens in the dtype of the accumulator.
    eps = torch.finfo(dtype).eps
    return eps, _SLACK * eps * math.sqrt(reduction) * scale


_TABLE = {
    "output": _output,
    "score": _score,
    "statistic": _statistic,
    "factor": _factor,
    "solve": _solve,
    "gram": _gram,
}


def tol(
    kind: str, dtype: torch.dtype, *, reduction: int = 1, scale: float = 1.0
) -> dict[str, float]:
    """``rtol`` and ``atol`` for ``torch.testing.assert_close``.

    Args:
        kind: "output" (of a linear layer), "score" (z), "statistic" (of norms), "factor"
            (``L L^T``), "solve", "gram".
        dtype: of the model's tensors for the first three, of the matrix for the others.
        reduction: length of the longest sum.
        scale: size of what is rounded, e.g. the largest entry of the expected result.
    """
    rtol, atol = _TABLE[kind](dtype, reduction, float(scale))
    return {"rtol": rtol, "atol": atol}
