"""The settings of an edit, and the two presets: ours and the published one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from coachhook.editing.prompts import PLACES, check_contexts
from coachhook.models import KEY_SITES

if TYPE_CHECKING:
    from torch import nn

    from coachhook.models import ModelDescription

SCOPES = ("sequence", "prefix", "population", "membership")
STORAGES = ("auto", "dense", "factored")
KEY_POOLINGS = ("mean", "each")
SCALINGS = ("coordinate", "vector")

# Texts of several lengths that shift the subject away from the start, as MEMIT's sampled prefixes
# do (Meng et al. 2023, section 4.3), but the same in every run.
DEFAULT_CONTEXTS = (
    "{}",
    "The book is old. {}",
    "References: vol. 12, pp. 34-56. {}",
    "He was there for most of the year, and then he moved to another town with his family. {}",
)
PAPER_CONTEXTS = (
    "{}",
    "The old man went to the market in the morning. {}",
    "Therefore, it is often said in this part of the country. {}",
    "Because the weather was fine, they stayed outside. {}",
    "I think that we have seen this before. {}",
    "You can read about it in many books. {}",
)
# Fields of earlier folders that nothing depends on any more.
_RETIRED = ("target_parts", "alpha_prompt")
# Fields that came later, as edits before them were made.
_BEFORE = {
    "target_betas": (0.9, 0.999),
    "target_scaling": "coordinate",
    "target_progress": 0.0,
    "target_ends_word": False,
}
# Models of at most so many blocks hold facts in the first ones.
_SMALL = 8
# From the second block on a subject's keys differ more between texts. Where the MLP lies beside the
# attention they still differ from those of other subjects.
_ALPHA_CUED_BESIDE = 0.6
# Keys of whole MLPs differ less between texts.
_ALPHA_CUED_MLP = 0.75
# (model_type, blocks) -> (Adam forwards, prior weight) of the published experiments.
_PAPER_SETTINGS = {("gpt2", 48): (20, 15000.0), ("gptj", 28): (25, 15000.0)}


@dataclass(frozen=True)
class EditConfig:
    """How facts are written. Make one with :meth:`for_model` or :meth:`paper`.

    Args:
        layers: indices of the blocks whose down-projection is edited, ascending; kept as a list.
        covariance_weight: lambda, the weight of the mean key covariance in the prior
            ``C0 = lambda Cov`` (MEMIT, Meng et al. 2023, equation 15).
        ridge: share of the covariance's mean diagonal added to its diagonal, so that few tokens do
            not make the prior singular.
        alpha: threshold of the gate: a z-score, or a coefficient for the membership scope. Where it
            is a z-score it falls with the batches, see :class:`~coachhook.editing.Editor`.
        scope: "sequence" (the paper), "prefix", "population" or "membership".
        alpha_ceiling: in the membership scope with the correction "own", an edit that some key of
            the unrelated sample comes near has its threshold raised to midway between that key's
            coefficient and its own, at most to this.
        cues: in the membership scope with the correction "own", an edit fires only where its cue
            was read in the same sequence up to 8 tokens before, an earlier token of its subject,
            or, for one at the prompt's last token or in the target, up to 40 tokens before, the
            subject itself. See :mod:`coachhook.editing.cues`. Without cues a token is judged by
            itself, and nothing is written at a prompt's last token, whose key the same words about
            others share.
        alpha_cued: threshold of an edit that has a cue, whatever the unrelated sample says, at a
            token of the subject.
        alpha_answer: the same at the prompt's last token and in the target, whose cue is the whole
            subject.
        include_padding: whether padding enters the sequence statistics, as in the published code.
            The membership scope has none, and never looks at padding.
        contexts: templates with one ``{}`` into which prompts are set; the first is ``"{}"``. One
            that a long prompt leaves no room for loses its first words.
        key_pooling: "mean" takes one key for each request, half of it from the bare prompt and half
            from the mean over the other contexts (the published code); "each" keeps every context's
            key.
        sharing: how the layers share the residual: "even" gives each layer its part of what is left
            (MEMIT, equation 20), "first" all that is left, so that the lowest takes nearly all.
        correction: for the membership scope, "own" adds the target of the edit that fired, "sum"
            the whole ``Delta x``.
        places: where a fact may be written, in the order they are taken: every request starts with
            the first and the tokens of its target, and one whose target does not come out in every
            context (at the subject's tokens: in every rewording too) goes on with the next as well.
            See :data:`~coachhook.editing.prompts.PLACES`.
        target_steps: most forwards of the optimisation of one target (for
            each place added); one Adam step fewer. A forward that asks the rewordings may follow.
        target_lr: Adam's learning rate.
        target_betas: what Adam's mean gradient and mean square gradient keep in a step, each from 0
            to below 1.
        target_scaling: what Adam scales a step by: "coordinate", each coordinate's own mean square
            gradient (Kingma and Ba 2015), or "vector", that of a place's whole correction, which
            leaves the gradient its direction (as Adam-mini does by blocks, Zhang et al. 2024).
        target_loss_layer: block whose output the likelihood is read from; None is the last.
        target_weight_decay: weight of ``||delta|| / ||h||^2``.
        target_clamp: largest ``||delta|| / ||h||``.
        target_kl: weight of the drift ``KL(p || p_0)`` on "{subject} is a".
        target_stop: a request stops when its loss is below this.
        target_progress: it leaves a place, too, where after the first five steps two have lowered
            its loss by less than this share. 0: it never does.
        target_ends_word: whether the target's last word must end with it, too: the loss of the bare
            prompt has the log-probability of what does not go on with the word after the target.
        rewordings: at most so many other wordings of each request, which the model says by itself,
            are optimised with it; see :mod:`coachhook.editing.rewordings`. 0 is none.
        state_dtype: "float64"; or "float32", which rounds the accumulated covariance and the hook's
            weight after every batch as the published code does (z-score scopes only); what is
            rounded is stored densely, whatever ``storage`` says.
        storage: "dense", "factored", or "auto" (factored while it is cheaper). The membership scope
            has a form of its own whatever is asked, one pair of vectors for each edit.
        max_rank: largest rank of a factored correction; above it storage is dense. None is the
            break-even. Not for the membership scope either.
        max_keys: keys kept beside the prior before the oldest are folded into it; None is the
            memory's own rule. Not for the membership scope, which keeps all keys whether folded or
            not, nor for ``state_dtype="float32"``.
        false_fire: the share of unrelated tokens that may fire. In the population scope alpha does
            not fall below the score that goes with it; in the membership scope without cues a
            further place is taken only where its key keeps to it.
        key_site: what a layer's hook lies over, whose input is the key: "down_proj", the
            down-projection (the paper), or "mlp", the whole MLP, whose input is narrower and
            differs less between contexts. Statistics have to be of the same.

    Raises:
        ValueError: a field is out of range.
    """

    layers: Sequence[int] = field(hash=False)
    covariance_weight: float = 15.0
    ridge: float = 1e-6
    alpha: float = 0.7
    alpha_ceiling: float = 0.95
    cues: bool = True
    alpha_cued: float = 0.7
    alpha_answer: float = 0.5
    scope: str = "membership"
    include_padding: bool = False
    contexts: Sequence[str] = DEFAULT_CONTEXTS
    key_pooling: str = "each"
    sharing: str = "first"
    correction: str = "own"
    places: Sequence[str] = PLACES
    target_steps: int = 15
    target_lr: float = 1.2
    target_betas: Sequence[float] = (0.4, 0.95)
    target_scaling: str = "vector"
    target_loss_layer: int | None = None
    target_weight_decay: float = 0.5
    target_clamp: float = 20.0
    target_kl: float = 0.0
    target_stop: float = 0.05
    target_progress: float = 0.2
    target_ends_word: bool = True
    rewordings: int = 3
    state_dtype: str = "float64"
    storage: str = "auto"
    max_rank: int | None = None
    max_keys: int | None = None
    false_fire: float = 1e-3
    key_site: str = "down_proj"

    def __post_init__(self) -> None:
        self._check_types()
        layers: list[Any] = list(self.layers) if isinstance(self.layers, Iterable) else []
        if (
            not layers
            or not all(_is_int(i) for i in layers)
            or layers != sorted(set(layers))
            or layers[0] < 0
        ):
            raise ValueError(
                f"EditConfig: layers must be ascending indices without repeats, got {self.layers!r}"
            )
        object.__setattr__(self, "layers", [int(i) for i in layers])
        object.__setattr__(self, "contexts", check_contexts(self.contexts))
        places = tuple(self.places) if isinstance(self.places, Iterable) else ()
        known = set(places) <= set(PLACES) and len(set(places)) == len(places)
        if not places or places[0] != PLACES[0] or not known:
            raise ValueError(
                f"EditConfig: places must start with {PLACES[0]!r} and be of "
                f"{', '.join(PLACES)}, each once, got {self.places!r}"
            )
        object.__setattr__(self, "places", places)
        for name, allowed in (
            ("key_site", KEY_SITES),
            ("scope", SCOPES),
            ("state_dtype", ("float64", "float32")),
            ("storage", STORAGES),
            ("key_pooling", KEY_POOLINGS),
            ("correction", ("own", "sum")),
            ("sharing", ("even", "first")),
            ("target_scaling", SCALINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"EditConfig: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        betas = self.target_betas
        if (
            not isinstance(betas, tuple | list)
            or len(betas) != 2
            or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
        ):
            raise ValueError(
                f"EditConfig: target_betas must be two numbers from 0 to below 1, got {betas!r}"
            )
        object.__setattr__(self, "target_betas", tuple(betas))
        for name in (
            "covariance_weight",
            "target_lr",
            "target_clamp",
            "target_steps",
            # Thresholds that a token without any coefficient must not pass: no edit is its own.
            "alpha_cued",
            "alpha_answer",
            *(["alpha"] if self.scope == "membership" and self.correction == "own" else []),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"EditConfig: {name} must be positive, got {getattr(self, name)!r}"
                )
        for name in (
            "ridge",
            "target_weight_decay",
            "target_kl",
            "target_stop",
            "target_progress",
            "rewordings",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"EditConfig: {name} must not be negative, got {getattr(self, name)!r}"
                )
        if not 0 <= self.false_fire <= 1:
            raise ValueError(f"EditConfig: false_fire must be from 0 to 1, got {self.false_fire!r}")
        if self.state_dtype == "float32" and self.scope == "membership":
            raise ValueError(
                "EditConfig: state_dtype must be 'float64' for the membership scope, got "
                "'float32', which the paper preset has; pass state_dtype='float64' with the scope"
            )
        for name, value, why in (
            ("state_dtype", "float32", "keeps no keys apart"),
            ("scope", "membership", "needs all keys"),
        ):
            if self.max_keys is not None and getattr(self, name) == value:
                raise ValueError(
                    f"EditConfig: max_keys must be None for {name} {value!r}, which {why}, "
                    f"got {self.max_keys!r}"
                )
        for name in ("max_rank", "max_keys"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EditConfig: {name} must be at least 1 or None, got {value!r}")

    def _check_types(self) -> None:
        """Numbers are numbers: a NaN would pass every comparison that refuses."""
        for known in fields(self):
            value, usual = getattr(self, known.name), known.default
            if isinstance(usual, bool):
                fits, what = isinstance(value, bool), "True or False"
            elif isinstance(usual, int):
                fits, what = _is_int(value), "an int"
            elif isinstance(usual, float):
                fits = isinstance(value, Real) and not isinstance(value, bool)
                fits = fits and math.isfinite(value)
                what = "a finite number"
            elif usual is None:
                fits, what = value is None or _is_int(value), "an int or None"
            else:
                continue
            if not fits:
                raise ValueError(f"EditConfig: {known.name} must be {what}, got {value!r}")

    @classmethod
    def for_model(cls, model: nn.Module, **overrides: Any) -> EditConfig:
        """The default preset for ``model``; docs/quality-choices.md tells what it was chosen by.

        Args:
            model: a transformers causal language model.
            overrides: fields to set otherwise.

        Raises:
            UnsupportedModelError: nothing editable was found.
            ValueError: a layer index is out of range, or a field is.
        """
        return _checked(model, {"layers": None, **overrides}, cls, single=True)

    @classmethod
    def paper(cls, model: nn.Module, **overrides: Any) -> EditConfig:
        """The published algorithm and hyper-parameters (CoachHooK, EMNLP 2024).

        Every layer's gate is a z-score over the padded sequence, keys are averaged over contexts,
        the residual is divided by the number of layers still to come.

        Args:
            model: a transformers causal language model.
            overrides: fields to set otherwise.

        Raises:
            UnsupportedModelError: nothing editable was found.
            ValueError: a layer index is out of range, or a field is.
        """
        config: Any = model.config
        key = (config.model_type, getattr(config, "num_hidden_layers", 0))
        steps, weight = _PAPER_SETTINGS.get(key, (25, 15000.0))
        preset: dict[str, Any] = {
            "layers": None,
            "covariance_weight": weight,
            "ridge": 0.0,
            "alpha": 2.2,
            "scope": "sequence",
            "include_padding": True,
            "contexts": PAPER_CONTEXTS,
            "key_pooling": "mean",
            "sharing": "even",
            "correction": "sum",
            "places": PLACES[:1],
            "target_steps": steps,
            "target_lr": 0.5,
            "target_betas": (0.9, 0.999),
            "target_scaling": "coordinate",
            "target_weight_decay": 0.5,
            "target_clamp": 0.75,
            "target_kl": 0.0625,
            "target_stop": 0.05,
            "target_progress": 0.0,
            "target_ends_word": False,
            "rewordings": 0,
            "cues": False,
            "state_dtype": "float32",
        }
        return _checked(model, {**preset, **overrides}, cls)

    @property
    def counts_padding(self) -> bool:
        """Whether what a prompt is padded with has a part in the gate's statistics."""
        return self.include_padding and self.scope != "membership"

    @property
    def uses_cues(self) -> bool:
        """Whether edits wait for their cues, which takes the membership scope and "own"."""
        return self.cues and self.scope == "membership" and self.correction == "own"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> EditConfig:
        """The inverse of :meth:`to_dict`, also of earlier versions.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        record = {k: v for k, v in {**_BEFORE, **record}.items() if k not in _RETIRED}
        unknown = sorted(set(record) - known)
        if unknown or "layers" not in record:
            what = f"unknown {', '.join(unknown)}" if unknown else "no layers"
            raise ValueError(f"EditConfig: fields must be those of this version, got {what}")
        return cls(**record)

    def with_(self, **changes: Any) -> EditConfig:
        """A copy with other values for some fields."""
        return replace(self, **changes)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked(
    model: nn.Module, values: dict[str, Any], cls: type[EditConfig], *, single: bool = False
) -> EditConfig:
    from coachhook.models import describe

    description = describe(model, values.get("key_site", "down_proj"))
    small, beside = description.num_layers <= _SMALL, bool(description.parallel_residual)
    if values["layers"] is None:
        layers = description.default_layers()
        if single or not description.layers[layers[-1]].adds_directly:
            # A correction that is looked up needs one layer only. Small models hold facts in the
            # first, large ones in the middle of the published range (Meng et al. 2022, causal
            # tracing). Beside its block's attention the first MLP reads a token in no context.
            first = int(beside and len(layers) > 1)
            at = first if small else len(layers) // 2
            layers = layers[at : at + 1]
        values["layers"] = layers
    config = cls(**values)
    if all(description.layer(layer).experts for layer in config.layers):
        config = config.with_(key_site="mlp")  # which they are hooked as, whatever was asked
    if single and "alpha_cued" not in values:
        if config.key_site == "mlp":
            config = config.with_(alpha_cued=_ALPHA_CUED_MLP)
        elif small and beside and config.layers[0] > 0:
            config = config.with_(alpha_cued=_ALPHA_CUED_BESIDE)
    check_layers(config, description)
    return config


def check_layers(config: EditConfig, description: ModelDescription) -> None:
    """Checks that a model has the layers of a configuration.

    Raises:
        ValueError: it has not, the likelihood would be read below the last edited one, or there are
            several whose outputs are not added to the residual as they are.
    """
    for layer in config.layers:
        indirect = not description.layer(layer).adds_directly
        if indirect and len(config.layers) > 1:
            raise ValueError(
                f"EditConfig: layers must be one layer, got {list(config.layers)}: the outputs of "
                f"{description.family}'s down-projections pass a norm or a scale before they are "
                "added to the residual, so that layers cannot share what is to be written; name "
                f"one, such as layers=[{config.layers[-1]}]"
            )
    if config.target_loss_layer is not None:
        description.layer(config.target_loss_layer)
        if config.target_loss_layer < config.layers[-1]:
            raise ValueError(
                "EditConfig: target_loss_layer must not lie below the last edited layer "
                f"{config.layers[-1]}, got {config.target_loss_layer}"
            )
