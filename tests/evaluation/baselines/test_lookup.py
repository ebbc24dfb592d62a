"""The nearest of many keys against one distance after another."""

from __future__ import annotations

import pytest
import torch

from coachhook.evaluation.baselines.lookup import NearestKey


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_key_is_that_of_the_plain_distances(dtype):
    keys = 3 + torch.randn(37, 200, dtype=dtype)
    # A key itself, one a hair beside another, and strangers.
    queries = torch.cat((keys[5:6], keys[9:10] + 1e-4, 3 + torch.randn(20, 200, dtype=dtype)))
    distances, numbers = NearestKey(keys)(queries)
    plain = torch.stack([(q - keys).square().sum(1).sqrt() for q in queries]).min(dim=1)
    assert distances.dtype == dtype
    assert torch.equal(numbers, plain.indices)
    torch.testing.assert_close(distances, plain.values)
    assert numbers[:2].tolist() == [5, 9]
    assert distances[0] == 0


def test_float32_keys_that_a_float32_product_would_mistake():
    """Two keys far from the origin and close together, as activations with a large mean are."""
    centre = torch.full((256,), 100.0)
    keys = torch.stack((centre, centre + torch.eye(256)[0] * 0.01))
    wanted = [0, 1, 1]
    queries = torch.stack((keys[0], keys[1], keys[1] + torch.eye(256)[1] * 0.001))
    product = (keys.square().sum(1) / 2 - queries @ keys.T).argmin(1).tolist()
    assert product != wanted
    distances, numbers = NearestKey(keys)(queries)
    assert numbers.tolist() == wanted
    assert distances[:2].tolist() == [0, 0]
    assert distances[2].item() == pytest.approx(0.001, rel=0.02)


def test_half_precision_queries_and_no_graph():
    keys = torch.randn(5, 8)
    queries = keys[[4, 2]].bfloat16().requires_grad_()
    with torch.inference_mode():
        nearest = NearestKey(keys)
    distances, numbers = nearest(queries)
    assert numbers.tolist() == [4, 2]
    assert distances.dtype == torch.float32 and not distances.requires_grad
