"""Rank-k update and downdate of a Cholesky factor, in place.

The edited layer's covariance ``C = L L^T`` gains the keys of a batch, ``C' = C + K K^T``, or loses
them again; the solve that the edit needs, ``C'^-1 K``, comes with the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.ops import _backends
from coachhook.ops._precision import without_autocast
from coachhook.ops._registry import register_op
from coachhook.ops.cholesky import cpu, cuda, reference
from coachhook.ops.cholesky._checks import check_arguments

__all__ = ["cholesky_downdate_", "cholesky_update_", "cholesky_update_solve_"]

for _module, _name in ((reference, "reference"), (cpu, "cpu"), (cuda, "cuda")):
    for _function in (
        _module.cholesky_update_,
        _module.cholesky_downdate_,
        _module.cholesky_update_solve_,
    ):
        # Without the extension the CUDA form runs on torch's products.
        _backends.register(_function.__name__, _name, _function, extension=False)


@torch.no_grad()
def _update_body(factor: Tensor, keys: Tensor, backend: str) -> None:
    update = _backends.resolve("cholesky_update_", backend, factor, keys)
    with without_autocast(factor.device.type):
        update(factor, keys)


@torch.no_grad()
def _downdate_body(factor: Tensor, keys: Tensor, backend: str) -> None:
    downdate = _backends.resolve("cholesky_downdate_", backend, factor, keys)
    with without_autocast(factor.device.type):
        downdate(factor, keys)


@torch.no_grad()
def _update_solve_body(factor: Tensor, keys: Tensor, backend: str) -> Tensor:
    solve = _backends.resolve("cholesky_update_solve_", backend, factor, keys)
    with without_autocast(factor.device.type):
        result: Tensor = solve(factor, keys)
    return result.contiguous()


def _mutate_fake(factor: Tensor, keys: Tensor, backend: str) -> None:
    return None


def _update_solve_fake(factor: Tensor, keys: Tensor, backend: str) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


_MUTATES = "(Tensor(a!) factor, Tensor keys, str backend) -> "
_UPDATE = register_op("cholesky_update_", _MUTATES + "()", _update_body, _mutate_fake)
_DOWNDATE = register_op("cholesky_downdate_", _MUTATES + "()", _downdate_body, _mutate_fake)
_UPDATE_SOLVE = register_op(
    "cholesky_update_solve_", _MUTATES + "Tensor", _update_solve_body, _update_solve_fake
)


def cholesky_update_(factor: Tensor, keys: Tensor, *, backend: str = "auto") -> None:
    """In place ``L L^T <- L L^T + K K^T``.

    Args:
        factor: L [n, n], float32 or float64, the lower triangle of a matrix with positive diagonal.
            The strict upper triangle is neither read nor written: zeros stay zeros. Any strides
            without shared elements; slices and transposed views are updated without a copy.
        keys: K [n, k], dtype and device of ``factor``; any k, 0 included.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; NaN or Inf in ``keys``.
        NotPositiveDefiniteError: ``factor`` is not a Cholesky factor, squares overflow, or keys
            outweigh ``L L^T`` by more than 1 / eps, so that nothing is left of it.
        BackendUnavailableError: the backend asked for cannot run here.

    After any error ``factor`` is bit-identical to before. No gradient is defined. The time is
    O(n^2 k), the extra memory O(n k), on CUDA O(n (n / 8 + k)). On CUDA the host waits once, at the
    end, to learn whether to raise (with more than 64 keys before the factor is written to). While a
    CUDA graph is captured it does not wait and nothing is raised: a replay that fails leaves
    ``factor`` as it is. float32 is not refined: solves with the factor have errors of
    about ``2e-7 sqrt(condition)``; see ``docs/kernels/cholesky.md``.
    """
    check_arguments("cholesky_update_", factor, keys)
    _UPDATE(factor, keys, backend)


def cholesky_downdate_(factor: Tensor, keys: Tensor, *, backend: str = "auto") -> None:
    """In place ``L L^T <- L L^T - K K^T``; arguments as in :func:`cholesky_update_`.

    The relative error of the result grows like ``eps / gap`` with the gap
    ``lambda_min(I - K^T (L L^T)^-1 K)``, whatever the method: what a sum has lost to rounding
    cannot be subtracted out of it.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`cholesky_update_`.
        NotPositiveDefiniteError: the gap is below ``8 n eps``, for instance because the keys were
            never added. After any error ``factor`` is bit-identical to before.
    """
    check_arguments("cholesky_downdate_", factor, keys)
    _DOWNDATE(factor, keys, backend)


def cholesky_update_solve_(factor: Tensor, keys: Tensor, *, backend: str = "auto") -> Tensor:
    """:func:`cholesky_update_`, returning ``(L L^T + K K^T)^-1 K`` [n, k] in the dtype of L.

    In a CUDA graph the solution of a replay that fails is NaN.

    This is the whole linear algebra of one batch of edits: ``Delta += R (C'^-1 K)^T``.
    """
    check_arguments("cholesky_update_solve_", factor, keys)
    result: Tensor = _UPDATE_SOLVE(factor, keys, backend)
    return result
