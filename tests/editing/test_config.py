"""The default preset of models of different build."""

from __future__ import annotations

import pytest
import torch

from coachhook.editing.config import EditConfig
from coachhook.models import describe, get_submodule
from tests.models.families import tiny

BESIDE = ("gptj", "phi", "gpt_neox")
ONE_AFTER_ANOTHER = ("gpt2", "llama", "gpt_neox-sequential")


def _deeper(arguments):
    """Six blocks, of which the first three are edited by default."""
    key = "n_layer" if "n_layer" in arguments else "num_hidden_layers"
    arguments[key] = 6


@torch.no_grad()
def _down_inputs(model, ids, layer):
    path = describe(model).layer(layer).path
    seen = []
    handle = get_submodule(model, path).register_forward_pre_hook(lambda _, args: seen.append(args))
    model(torch.tensor([ids]))
    handle.remove()
    return seen[0][0][0]


@pytest.mark.parametrize("name", BESIDE + ONE_AFTER_ANOTHER)
def test_a_small_models_default_is_the_first_block_that_reads_a_token_in_its_context(name) -> None:
    model = tiny(name, _deeper).eval()
    config = EditConfig.for_model(model)
    (layer,) = config.layers
    # The same token at the same position after another one.
    known, other = (_down_inputs(model, [first, 7], layer)[1] for first in (3, 9))
    assert not torch.allclose(known, other)
    if layer:
        below, same = (_down_inputs(model, [first, 7], layer - 1)[1] for first in (3, 9))
        assert torch.allclose(below, same)
    assert (layer, config.alpha_cued) == ((1, 0.6) if name in BESIDE else (0, 0.7))


def test_what_is_named_stays() -> None:
    model = tiny("gptj", _deeper)
    named = EditConfig.for_model(model, layers=[0])
    assert (named.layers, named.alpha_cued) == ([0], 0.7)
    assert EditConfig.for_model(model, layers=[1]) == EditConfig.for_model(model)
    assert EditConfig.for_model(model, alpha_cued=0.65).alpha_cued == 0.65
    assert EditConfig.paper(model).layers == describe(model).default_layers()
    assert EditConfig.for_model(tiny("gptj")).layers == [0]  # of three blocks only that one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers must be ascending indices .* got 3"),
        ({"layers": ["a"]}, "layers must be ascending indices"),
        ({"layers": [1, 0]}, "layers must be ascending indices"),
        ({"layers": [True]}, "layers must be ascending indices"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"target_lr": float("inf")}, "target_lr must be a finite number, got inf"),
        ({"covariance_weight": "a"}, "covariance_weight must be a finite number, got 'a'"),
        ({"target_steps": 2.5}, "target_steps must be an int, got 2.5"),
        ({"rewordings": True}, "rewordings must be an int, got True"),
        ({"cues": "no"}, "cues must be True or False, got 'no'"),
        ({"max_rank": 1.5}, "max_rank must be an int or None, got 1.5"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha_cued": -1.0}, "alpha_cued must be positive, got -1.0"),
        ({"alpha_answer": 0.0}, "alpha_answer must be positive, got 0.0"),
        ({"false_fire": 2.0}, "false_fire must be from 0 to 1, got 2.0"),
        ({"places": ["subject_last", "target", "target"]}, "places must .* each once"),
        ({"places": None}, "places must start with"),
        ({"contexts": None}, "contexts must start with"),
        ({"contexts": ["{}", 3]}, "contexts must have exactly one '{}' each, got 3"),
    ],
)
def test_values_of_another_kind_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=f"EditConfig: {message}"):
        EditConfig(**{"layers": [0], **changes})


def test_a_z_score_may_be_negative() -> None:
    assert EditConfig([0], scope="sequence", alpha=-1e9).alpha == -1e9


def test_a_sum_of_corrections_may_be_added_everywhere() -> None:
    assert EditConfig([0], correction="sum", alpha=-1e30).alpha == -1e30


def test_a_configuration_is_a_value() -> None:
    config = EditConfig(layers=(0, 2), target_steps=9)
    assert config.layers == [0, 2]
    assert config == EditConfig.from_dict(config.to_dict()) and len({config, config.with_()}) == 1
