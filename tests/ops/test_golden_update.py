"""The closed-form batch update of the published implementation, reproduced on its own numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from coachhook.editing.memory import EditMemory
from coachhook.ops import cholesky_update_solve_
from tests.ops.linalg_oracle import relative

CASES = ["s0", "s1", "s2", "biglam", "smalllam_N_gt_n", "one", "square_linear"]


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden"
    return json.loads((folder / "update.json").read_text()), load_file(
        folder / "update.safetensors"
    )


def prior_of(golden, case, layer):
    facts, tensors = golden
    return facts[case]["mom2_update_weight"] * tensors[f"{case}.l{layer}.cov"].double()


def steps(golden, case, layer):
    """Keys, residual share and the tensors' prefix of each batch."""
    facts, tensors = golden
    divisor = facts[case]["divisors"][layer]
    for batch in range(facts[case]["batches"]):
        prefix = f"{case}.b{batch}.l{layer}"
        yield tensors[f"{prefix}.K"], tensors[f"{prefix}.R"] / divisor, prefix


def test_all_cases_are_here(golden):
    assert sorted(golden[0]) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_factor_path_without_rounding_of_the_state(golden, case):
    facts, tensors = golden
    for layer in range(facts[case]["layers"]):
        factor = torch.linalg.cholesky(prior_of(golden, case, layer))
        weight = tensors[f"{case}.l{layer}.W0"].double()
        for keys, share, prefix in steps(golden, case, layer):
            change = share @ cholesky_update_solve_(factor, keys).mT
            weight += change
            assert relative(change, tensors[f"{prefix}.delta_exact"]) < 1e-12
            assert relative(weight, tensors[f"{prefix}.W_exact"]) < 1e-13
            assert relative(factor @ factor.mT, tensors[f"{prefix}.C_exact"]) < 1e-13
            assert relative(change, tensors[f"{prefix}.delta"]) < 1e-6
            assert relative(weight, tensors[f"{prefix}.W_new"].double()) < 1e-6
            assert relative(factor @ factor.mT, tensors[f"{prefix}.C_new"].double()) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_factor_path_from_the_rounded_state(golden, case):
    facts, tensors = golden
    for layer in range(facts[case]["layers"]):
        weight = tensors[f"{case}.l{layer}.W0"]
        state = facts[case]["mom2_update_weight"] * tensors[f"{case}.l{layer}.cov"]
        for keys, share, prefix in steps(golden, case, layer):
            factor = torch.linalg.cholesky(state.double())
            change = share @ cholesky_update_solve_(factor, keys).mT
            assert relative(change, tensors[f"{prefix}.delta"]) < 1e-12
            weight = (weight.double() + change).float()
            state = (factor @ factor.mT).float()
            torch.testing.assert_close(weight, tensors[f"{prefix}.W_new"], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(state, tensors[f"{prefix}.C_new"], rtol=1e-6, atol=1e-9)
            state = tensors[f"{prefix}.C_new"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_keys", [None, 0, 5])
def test_edit_memory(golden, case, max_keys):
    facts, tensors = golden
    for layer in range(facts[case]["layers"]):
        frozen = tensors[f"{case}.l{layer}.W0"].double()
        memory = EditMemory(prior_of(golden, case, layer), len(frozen), max_keys=max_keys)
        for keys, share, prefix in steps(golden, case, layer):
            memory.append(keys, memory.apply(keys) + share)
            assert relative(frozen + memory.delta(), tensors[f"{prefix}.W_exact"]) < 1e-13
            assert relative(frozen + memory.delta(), tensors[f"{prefix}.W_new"].double()) < 1e-6
        expected = tensors[f"{prefix}.W_exact"] - frozen
        assert relative(memory.delta(), expected) < 1e-12
