"""The peer of the speed comparison computes what the paper preset computes."""

from __future__ import annotations

import torch

from benchmarks.published_way import PublishedWay
from coachhook import EditConfig, Editor, EditRequest, collect_statistics
from coachhook.bundled import demo_facts, model_path, texts
from coachhook.models import load_model


def test_targets_weights_and_alphas_are_those_of_the_paper_preset():
    requests = [EditRequest.from_dict(fact) for fact in demo_facts()]
    systems = []
    for build in (Editor, PublishedWay):
        model, tokenizer = load_model(model_path(), dtype=torch.float32)
        layers = [0, 1]
        if not systems:
            statistics = collect_statistics(
                model, tokenizer, texts(), layers=layers, max_tokens=5000, progress=False
            )
        settings = dict(layers=layers, target_steps=6, covariance_weight=15.0)
        config = EditConfig.paper(model, **settings)
        if build is Editor:
            systems.append(Editor(model, tokenizer, statistics=statistics, config=config))
        else:
            systems.append(PublishedWay(model, tokenizer, statistics, config))
    ours, published = systems
    for batch in (requests[:2], requests[2:4]):
        result, targets = ours.edit(batch), published.edit(batch)
        assert (result.targets - targets).norm() <= 1e-4 * targets.norm()
        assert [s + 1 for s in result.steps] == published.steps[-2:]
        for layer, alpha in result.alphas.items():
            hook = published.hooks[layer]
            delta = (hook.weight - hook.frozen).detach()
            assert (ours.hooks[layer].delta() - delta).norm() <= 1e-3 * delta.norm()
            assert abs(alpha - hook.alpha) <= 1e-3
