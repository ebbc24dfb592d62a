"""MEND against its paper's equations, and what it learns from facts of the bundled model."""

from __future__ import annotations

import random

import pytest
import torch

from coachhook import EditRequest
from coachhook.bundled import demo_facts, facts, model_path
from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import make_baseline
from coachhook.evaluation.baselines.mend import GradientNetwork
from coachhook.evaluation.baselines.training_facts import TrainingFacts
from coachhook.evaluation.scoring import encode_pairs
from coachhook.models import load_model
from tests.evaluation.baselines.support import (
    BATCHES,
    LEARNING,
    double,
    logits_of,
    same,
    tiny_llama,
    unchanged,
    whole,
)

REQUESTS = [request for batch in BATCHES for request in batch]


@pytest.fixture(scope="module")
def bundled():
    return load_model(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def demo():
    return [EditRequest.from_dict(fact) for fact in demo_facts()[:5]]


@pytest.fixture(scope="module")
def others(demo):
    """Facts about subjects that are not edited."""
    pool = [EditRequest.from_dict(fact) for fact in facts()]
    subjects = {fact.subject for fact in demo}
    pool = [fact for fact in pool if fact.subject not in subjects]
    random.Random(0).shuffle(pool)
    return pool[:100]


@pytest.fixture(scope="module")
def learned(bundled, others, tmp_path_factory):
    """Networks trained for a few seconds, and the losses on the way."""
    path = tmp_path_factory.mktemp("mend") / "networks.safetensors"
    with make_baseline(
        "mend", *bundled, train_requests=others, steps=60, train_batch=5, progress=False
    ) as mend:
        mend.save_networks(path)
        return path, mend.losses


def _sum_of_losses(model, tokenizer, requests):
    """The loss a gradient is taken of, one request at a time."""
    total = 0
    for row in encode_pairs(tokenizer, [(r.text, r.target_new) for r in requests]):
        ids = torch.tensor([row.ids])
        logits = model(ids).logits[0, -row.target - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, -row.target :])
    return total


def test_the_network_is_equation_3():
    network = GradientNetwork(3, 2, rank=4, weights=2).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.mean.copy_(torch.randn(2, 5))
    network.std.copy_(torch.rand(2, 5) + 0.5)
    u, delta = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    with torch.no_grad():
        found = torch.cat(network(u, delta, 1), dim=1)
    p = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    for i in range(6):
        z = torch.cat((u[i], delta[i])).numpy()
        z = (z - p["mean"][1]) / (p["std"][1] + 1e-7)
        step = p["scale"][1, 0] * (p["u1"] @ (p["v1"] @ z) + p["b"]) + p["shift"][1, 0]
        h = z + step.clip(min=0)
        step = p["scale"][1, 1] * (p["u2"] @ (p["v2"] @ h)) + p["shift"][1, 1]
        torch.testing.assert_close(found[i].numpy(), h + step.clip(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_factors_are_the_gradient(family, model, tokenizer):
    model = double(model) if family == "gpt2" else tiny_llama(tokenizer).double()
    weights = {"gpt2": ["c_fc", "c_proj"], "llama": ["gate_proj", "up_proj", "down_proj"]}[family]
    with make_baseline("mend", model, tokenizer, **LEARNING, steps=0) as mend:
        batch = mend._batch(encode_pairs(tokenizer, [(r.text, r.target_new) for r in REQUESTS]))
        factors = mend._factors(batch, mend._values())
    assert len(factors) == 3 * len(weights)  # the last three blocks, all MLP weights
    modules = dict(model.named_modules())
    wanted = [modules[path].weight.requires_grad_(True) for path in factors]
    assert {path.rpartition(".")[2] for path in factors} == set(weights)
    gradients = torch.autograd.grad(_sum_of_losses(model, tokenizer, REQUESTS), wanted)
    for (u, delta), gradient in zip(factors.values(), gradients, strict=True):
        found = delta.T @ u
        found = found.T if family == "gpt2" else found
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_identity_networks_an_edit_is_a_step_of_gradient_descent(family, model, tokenizer):
    model = double(model) if family == "gpt2" else tiny_llama(tokenizer).double()
    with make_baseline("mend", model, tokenizer, **LEARNING, steps=0, alpha=0.01) as mend:
        for network in mend._networks.values():
            network.mean.zero_()
            network.std.fill_(1 - 1e-7)
        weights = [p.requires_grad_(True) for p in mend._parameters]
        loss = _sum_of_losses(model, tokenizer, REQUESTS[:2])
        gradients = torch.autograd.grad(loss, weights)
        wanted = [w - 0.01 * g for w, g in zip(weights, gradients, strict=True)]
        before = [w.detach().clone() for w in weights]
        mend.edit(REQUESTS[:2])
        for found, value, old in zip(weights, wanted, before, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
            assert not torch.equal(found, old)


def test_the_training_loss_is_differentiated_through_the_edit(model, tokenizer):
    """Against central differences, in the step sizes and in a network."""
    model = double(model)
    with make_baseline("mend", model, tokenizer, **LEARNING, steps=0, rank=4) as mend:
        facts_ = TrainingFacts("mend", tokenizer, LEARNING["train_requests"], 64)
        mend._normalise(facts_)
        network = next(iter(mend._networks.values()))
        torch.nn.init.normal_(network.u1, std=0.1)

        def loss():
            generator = torch.Generator().manual_seed(5)
            edit, locality = mend._training_losses(facts_, [0, 1], generator)
            assert locality > 0
            return edit + locality

        for parameter, index in ((mend._alphas, (0,)), (network.u1, (3, 1)), (network.b, (7,))):
            parameter.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(), parameter)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * 1e-6
                values.append(loss().item())
                with torch.no_grad():
                    parameter[index] -= sign * 1e-6
            wanted = (values[0] - values[1]) / 2e-6
            assert gradient[index].item() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_training_learns(learned):
    _, losses = learned
    assert len(losses) == 60
    edit = torch.tensor([e for e, _ in losses])
    locality = torch.tensor([loc for _, loc in losses])
    # It starts with steps too large to leave other facts alone, and learns which ones do.
    assert locality[-20:].mean() < 0.5 * locality[:5].mean()
    assert edit[-20:].mean() < 4


def test_it_edits_facts_it_has_not_seen(bundled, demo, learned):
    model, tokenizer = bundled
    state = whole(model)
    with make_baseline("mend", model, tokenizer, networks=learned[0]) as mend:
        result = mend.edit(demo)
        assert sum(result.converged) >= 3
        report = evaluate(model, tokenizer, demo, hooks=mend, progress=False, max_new_tokens=6)
        with mend.disabled():
            assert unchanged(state, whole(model))
    after, before = (report["teacher_forced"][when] for when in ("after", "before"))
    assert before["reliability"] == 0
    assert after["reliability"] >= 0.6
    assert after["generality"] >= 0.4
    assert after["locality"] >= 0.7
    assert after["reliability"] == sum(result.converged) / 5
    assert unchanged(state, whole(model))


def test_batches_of_original_gradients_add_up(bundled, demo, learned):
    tokenizer = bundled[1]
    found = {}
    for gradients in ("original", "edited"):
        for batches in ([demo[:4]], [demo[:2], demo[2:4]]):
            with make_baseline(
                "mend", bundled[0], tokenizer, networks=learned[0], gradients=gradients
            ) as mend:
                for batch in batches:
                    mend.edit(batch)
                found[gradients, len(batches)] = mend._values()
    # Float32 weights: the sums differ by rounding.
    for one, two in zip(found["original", 1], found["original", 2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert same(found["original", 1], found["edited", 1])
    gap = [(a - b).abs().max() for a, b in zip(found["edited", 1], found["edited", 2], strict=True)]
    assert max(gap) > 1e-3


def test_small_steps_of_many_batches_are_kept_in_bfloat16(model, tokenizer, tmp_path):
    """Each is smaller than what rounding leaves of a weight; together they are not."""
    model, alpha = double(model).bfloat16(), 1e-4
    path = tmp_path / "networks.safetensors"
    found = []
    for batches in ([REQUESTS * 10], [REQUESTS] * 10):
        options = {"networks": path} if path.exists() else LEARNING
        with make_baseline("mend", model, tokenizer, **options, steps=0, alpha=alpha) as mend:
            if not path.exists():
                mend.save_networks(path)
            for batch in batches:
                mend.edit(batch)
            found.append([a - b for a, b in zip(mend._values(), mend._original, strict=True)])
    for one, ten in zip(*found, strict=True):
        assert bool(one.any())
        assert float((one - ten).norm()) < 0.02 * float(one.norm())


def test_the_same_seed_gives_the_same_networks(model, tokenizer):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # which must not matter
        with make_baseline(
            "mend", model, tokenizer, **LEARNING, steps=2, train_batch=2, rank=4, seed=seed
        ) as mend:
            found.append([*mend._networks.state_dict().values(), mend._alphas.detach()])
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_networks_are_kept_and_belong_to_a_model(model, tokenizer, tmp_path):
    settings = {"steps": 2, "train_batch": 2, "rank": 4}
    path = tmp_path / "networks.safetensors"
    with make_baseline("mend", model, tokenizer, **LEARNING, **settings) as mend:
        mend.edit(BATCHES[0])
        mend.save_networks(path)  # while the model is edited: bound to the unedited weights
        edited = mend._values()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with make_baseline("mend", model, tokenizer, networks=path, rank=4) as mend:
        mend.edit(BATCHES[0])
        assert same(mend._values(), edited)
    with pytest.raises(ValueError, match="trained with the settings"):
        make_baseline("mend", model, tokenizer, networks=path, rank=5)
    other = double(model).float()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(FingerprintMismatchError, match="trained for these weights"):
        make_baseline("mend", other, tokenizer, networks=path, rank=4)
    with pytest.raises(FormatError, match="those of serac"):
        make_baseline("serac", model, tokenizer, networks=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="safetensors"):
        make_baseline("mend", model, tokenizer, networks=path, rank=4)
    with pytest.raises(FileNotFoundError, match="must name a file"):
        make_baseline("mend", model, tokenizer, networks=tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"train_requests": []}, ValueError, "at least two facts"),
        ({"train_requests": REQUESTS[:1]}, ValueError, "at least two facts"),
        ({"train_requests": REQUESTS[0]}, TypeError, "must be a list of EditRequest"),
        ({"train_requests": ["x", "y"]}, TypeError, "must be a list of EditRequest"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"alpha": 0.0}, ValueError, "alpha must be positive"),
        ({"c_loc": -1.0}, ValueError, "c_loc must not be negative"),
        ({"gradients": "both"}, ValueError, "gradients must be one of original, edited"),
        ({"layers": [2, 1]}, ValueError, "layers must be ascending"),
        ({"layers": [3]}, ValueError, "from 0 to 2"),
        ({"alpha": 1e30, "steps": 3}, ValueError, "training loss must be finite"),
        (
            {"train_requests": [*REQUESTS, EditRequest("{} " + "and " * 90, "Bob", "Spain")]},
            ValueError,
            "context window of 64",
        ),
    ],
)
def test_bad_settings(options, kind, message, model, tokenizer):
    state, plain = whole(model), logits_of(model, tokenizer)
    with pytest.raises(kind, match=message):
        make_baseline("mend", model, tokenizer, **{**LEARNING, **options})
    assert unchanged(state, whole(model))
    assert same(logits_of(model, tokenizer), plain)
