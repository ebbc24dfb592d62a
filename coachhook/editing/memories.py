"""The memory that an editor starts a layer with."""

from __future__ import annotations

from torch import nn

from coachhook.editing.config import EditConfig
from coachhook.editing.folded import most_keys
from coachhook.editing.folder import memory_device
from coachhook.editing.memory import EditMemory, regularized_prior
from coachhook.editing.published import PublishedMemory
from coachhook.models import EditableLayer, ModelDescription, describe, get_submodule, weight_of
from coachhook.statistics import Statistics


def check_site(
    model: nn.Module, statistics: Statistics, config: EditConfig, description: ModelDescription
) -> None:
    """Checks that statistics are of the keys that are edited.

    Raises:
        ValueError: they are those of other modules of the layers.
    """
    if statistics.key_site == config.key_site:
        return
    other = describe(model, statistics.key_site)  # blocks with experts have one site
    if any(other.layer(i).path != description.layer(i).path for i in config.layers):
        raise ValueError(
            f"Editor: statistics must be of key_site {config.key_site!r}, that of config, got "
            f"{statistics.key_site!r}; collect statistics there, or set the other key_site"
        )


def new_memory(
    model: nn.Module, layer: EditableLayer, statistics: Statistics, config: EditConfig
) -> EditMemory | PublishedMemory:
    """An empty memory for one layer of a model, of the kind that the settings ask for.

    Raises:
        NotPositiveDefiniteError: the covariance is singular.
        ValueError: the layer has no plain weight and ``state_dtype`` is "float32".
    """
    module = get_submodule(model, layer.path)
    covariance = statistics.covariances[layer.index].to(memory_device(model, layer.index))
    if config.state_dtype == "float32":
        frozen = weight_of(module)
        if frozen is None:
            raise ValueError(
                f"Editor: {layer.path} must have a plain weight for state_dtype 'float32', got "
                f"{type(module).__name__}; use state_dtype='float64'"
            )
        if config.ridge:
            covariance = regularized_prior(covariance, 1.0, config.ridge)
        return PublishedMemory(covariance, config.covariance_weight, frozen)
    prior = regularized_prior(covariance, config.covariance_weight, config.ridge)
    if config.scope != "membership":
        return EditMemory(prior, layer.out_features, max_keys=config.max_keys)
    # Coefficients need every key, folded or not; cues are those of the prior without keys.
    most = most_keys(layer.in_features)
    return EditMemory(prior, layer.out_features, max_keys=most, keep_prior=True)
