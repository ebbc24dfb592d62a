"""What editing needs to know of a model: where its layers are and what shape they have."""

from __future__ import annotations

from dataclasses import dataclass

from coachhook.models.families import default_layers

# Where keys are read: at the down-projection, or at what the MLP as a whole reads.
KEY_SITES = ("down_proj", "mlp")


@dataclass(frozen=True)
class EditableLayer:
    """The down-projection of one block, ``y = W0 x + b`` with ``W0 [m, n]``.

    With the key site "mlp", the whole MLP, and of a block with experts the module that holds them:
    x is what it reads, y what it gives, and n = m = d.

    Attributes:
        index: index of the block.
        path: dotted path of the down-projection, or of that module, from the model's root.
        block_path: dotted path of the block.
        in_features: n, the width of the MLP's hidden layer; d where the whole MLP is hooked.
        out_features: m, the width of the residual stream.
        post_norm_path: dotted path of the norm that ``y`` passes before it is added to the residual
            (Gemma 2, OLMo 2); None where there is none.
        residual_scale: what ``y`` is multiplied by before that (Granite).
        experts: whether the block has experts.
    """

    index: int
    path: str
    block_path: str
    in_features: int
    out_features: int
    post_norm_path: str | None = None
    residual_scale: float = 1.0
    experts: bool = False

    @property
    def adds_directly(self) -> bool:
        """Whether ``y`` is added to the residual as it is."""
        return self.post_norm_path is None and self.residual_scale == 1

    @property
    def target_path(self) -> str:
        """Path of the module whose output a target v* is.

        The block where ``y`` is added as it is, since what is added to either is the same; the
        down-projection itself elsewhere.
        """
        return self.block_path if self.adds_directly else self.path


@dataclass(frozen=True)
class ModelDescription:
    """Paths and sizes of a causal language model; made by :func:`coachhook.models.describe`.

    Attributes:
        family: ``config.model_type``.
        layers: one :class:`EditableLayer` per block, in order.
        blocks_path: dotted path of the list of blocks.
        final_norm_path: dotted path of the norm before the head.
        lm_head_path: dotted path of the output embedding.
        base_model_path: dotted path of the module whose forward runs the blocks, given the mask and
            the cache: the model below the head, or its decoder.
        hidden_size: d, the width of the residual stream.
        max_positions: longest input in tokens, ``None`` where the architecture sets no bound.
        parallel_residual: whether attention and MLP of a block read the same residual.
        logit_scale: what the head's output is multiplied by to give the logits, as in Cohere and
            Granite.
        logit_cap: c of logits that are ``c tanh(logits / c)``, as in NanoChat; None for others.
    """

    family: str
    layers: list[EditableLayer]
    blocks_path: str
    final_norm_path: str
    lm_head_path: str
    base_model_path: str
    hidden_size: int
    max_positions: int | None
    parallel_residual: bool
    logit_scale: float = 1.0
    logit_cap: float | None = None

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def layer(self, index: int) -> EditableLayer:
        """The editable layer of block ``index``.

        Raises:
            ValueError: there is no such block; the message names the valid range.
        """
        valid = isinstance(index, int) and not isinstance(index, bool)
        if not valid or not 0 <= index < self.num_layers:
            raise ValueError(
                f"layer: index must be an integer from 0 to {self.num_layers - 1} "
                f"({self.family}, {self.num_layers} layers), got {index!r}"
            )
        return self.layers[index]

    def default_layers(self) -> list[int]:
        """The layers to edit when none are named, see :func:`~.families.default_layers`."""
        return default_layers(self.family, self.num_layers, self.hidden_size)
