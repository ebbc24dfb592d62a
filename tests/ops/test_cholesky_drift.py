"""Hundreds of batches: the factor does not drift, and solves stay at the error of a joint solve."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from coachhook.ops import cholesky_downdate_, cholesky_update_, cholesky_update_solve_
from coachhook.ops.cholesky import cuda
from tests.ops.linalg_oracle import F64, batches, exact, joint, relative, spd

QUICK = [(1e4, True), (1e10, False)]
THOROUGH = [case for case in product((1e4, 1e6, 1e8, 1e10), (False, True)) if case not in QUICK]


@pytest.mark.parametrize(
    ("condition", "isotropic"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)],
)
def test_a_thousand_batches(condition, isotropic):
    n, m, k = 96, 8, 4
    prior, root = spd(n, condition)
    made = batches(root, 1000, k, m, isotropic=isotropic)
    factor, delta = torch.linalg.cholesky(prior), torch.zeros(m, n, dtype=F64)
    total = prior.numpy().astype(np.longdouble)
    for keys, targets in made:
        solved = cholesky_update_solve_(factor, keys)
        delta += (targets - delta @ keys) @ solved.mT
        wide = keys.numpy().astype(np.longdouble)
        total = total + wide @ wide.T
    assert relative(factor @ factor.mT, torch.from_numpy(total.astype(np.float64))) < 1e-13
    truth = exact(prior, made)
    assert relative(delta, truth) < 10 * relative(joint(prior, made), truth)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("isotropic", [False, True], ids=["from_prior", "isotropic"])
def test_a_thousand_larger_batches(condition, isotropic):
    n, k = 512, 16
    prior, root = spd(n, condition)
    factor, total = torch.linalg.cholesky(prior), prior.clone()
    for keys, _ in batches(root, 1000, k, 1, isotropic=isotropic):
        cholesky_update_(factor, keys)
        total += keys @ keys.mT
    assert relative(factor @ factor.mT, total) < 1e-13


def test_updates_and_downdates_in_random_order_undo():
    n, k, order = 96, 6, random.Random(0)
    prior, root = spd(n, 1e6)
    made = [keys for keys, _ in batches(root, 300, k, 1)]
    factor, live = torch.linalg.cholesky(prior), []
    for keys in made:
        if len(live) < 10 or order.random() < 0.5:
            cholesky_update_(factor, keys)
            live.append(keys)
        else:
            cholesky_downdate_(factor, live.pop(order.randrange(len(live))))
    order.shuffle(live)
    for keys in live:
        cholesky_downdate_(factor, keys)
    assert relative(factor @ factor.mT, prior) < 1e-12


def test_solution_is_better_than_a_fresh_solve_where_keys_outweigh_the_prior():
    prior, root = spd(96, 1e8)
    made = batches(root, 10, 4, 8, isotropic=True)
    factor, delta = torch.linalg.cholesky(prior), torch.zeros(8, 96, dtype=F64)
    for keys, targets in made:
        delta += (targets - delta @ keys) @ cholesky_update_solve_(factor, keys).mT
    truth = exact(prior, made)
    assert relative(delta, truth) < 0.3 * relative(joint(prior, made), truth)


@pytest.mark.parametrize("k", [40, 64, 100, 200, 300, 1100])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "as_on_a_gpu"])
def test_many_keys_that_outweigh_the_matrix(k, on_gpu):
    n = 1200 if k > 1000 else 400
    factor = torch.eye(n, dtype=F64)
    keys = 1e3 * torch.randn(n, k, dtype=F64, generator=torch.Generator().manual_seed(k))
    if on_gpu:
        cuda.modify_("cholesky_update_", factor, keys, 1, None)
    else:
        cholesky_update_(factor, keys)
    expected = torch.eye(n, dtype=F64) + keys @ keys.mT
    assert relative(factor @ factor.mT, expected) < 1e-11


def test_batch_that_determines_every_direction():
    # More keys than n on a prior of no weight: here the solve must use the new factor.
    prior, root = spd(64, 1e10)
    made = batches(root, 1, 160, 8, isotropic=True)
    factor = torch.linalg.cholesky(prior)
    delta = made[0][1] @ cholesky_update_solve_(factor, made[0][0]).mT
    assert relative(delta, exact(prior, made)) < 1e-9
