"""Modules by dotted path, and what a module says of the linear map it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from coachhook.errors import UnsupportedModelError
from coachhook.models.description import EditableLayer
from coachhook.models.sharded import is_sharded

# Of what a layer that rounds its inputs, too, has for a gradient.
_GRADIENT_TOLERANCE = 0.25


def get_submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule of ``model`` at a dotted path such as ``"transformer.h.0.mlp.c_proj"``.

    Raises:
        ValueError: no module lies at that path; the message names the part that is missing.
    """
    module = model
    walked: list[str] = []
    for name in path.split(".") if path else []:
        child = module._modules.get(name)
        if child is None:
            where = ".".join(walked) or type(model).__name__
            raise ValueError(
                f"get_submodule: path must name a module of {type(model).__name__}, got {path!r}: "
                f"{where} has no {name!r}"
            )
        module = child
        walked.append(name)
    return module


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path, on the parent instance that holds that name already.

    Raises:
        ValueError: the path is empty or no module lies there yet.
    """
    if not path:
        raise ValueError("set_submodule: path must name a module below the model, got ''")
    get_submodule(model, path)
    parent, _, name = path.rpartition(".")
    setattr(get_submodule(model, parent), name, module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(n, m)`` = (input features, output features) of a module that maps the last dimension.

    Understands ``in_features`` / ``out_features`` (``nn.Linear`` and what imitates it, quantised
    layers included) and the ``nf`` of GPT-2's ``Conv1D``, whose weight is stored as ``[n, m]``.

    Raises:
        TypeError: the module says neither.
    """
    n, m = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(n, int) and isinstance(m, int):
        return n, m
    weight, nf = getattr(module, "weight", None), getattr(module, "nf", None)
    if isinstance(nf, int) and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], nf
    raise TypeError(
        "linear_shape: module must have in_features and out_features (or be a Conv1D), "
        f"got {type(module).__name__}"
    )


def is_linear_like(module: nn.Module) -> bool:
    """Whether :func:`linear_shape` can tell the shape of ``module``."""
    try:
        linear_shape(module)
    except TypeError:
        return False
    return True


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight as ``[m, n]``: a view of the parameter, transposed for ``Conv1D``.

    ``None`` where there is no plain floating-point matrix of that shape, as in quantised modules.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    n, m = linear_shape(module)
    if isinstance(getattr(module, "nf", None), int):
        weight = weight.t()
    return weight if weight.shape == (m, n) else None


def plain_parts(value: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or the parts of a subclass.

    A quantised weight of torchao, for one, answers to products alone. A DTensor is gathered: all
    processes that hold it must ask.
    """
    if is_sharded(value):
        yield from plain_parts(cast(Any, value).full_tensor())
        return
    if type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(value, name))


def check_finite(model: nn.Module) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        ValueError: naming the first such tensors and how many there are.
    """
    bad = []
    for name, parameter in model.named_parameters():
        for part in plain_parts(parameter.detach()):
            if not part.is_floating_point() or part.is_meta or not part.numel():
                continue
            low, high = torch.aminmax(part)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad.append(name)
                break
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"check_finite: the weights of {type(model).__name__} must be finite, "
            f"got NaN or infinity in {', '.join(bad[:3])}{more}. The checkpoint is damaged or was "
            "loaded in a dtype it overflows; load it again, for instance in bfloat16 or float32"
        )


def passage(model: nn.Module, layer: EditableLayer) -> Callable[[Tensor], Tensor]:
    """What outputs ``[.., m]`` of a down-projection become before the residual takes them."""
    norm = None
    if layer.post_norm_path is not None:
        norm = get_submodule(model, layer.post_norm_path)

    def passed(states: Tensor) -> Tensor:
        states = states if norm is None else norm(states)
        return states if layer.residual_scale == 1 else layer.residual_scale * states

    return passed


def check_gradients(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Check that gradients pass through the quantised linear layers among some modules.

    Kernels of quantisation libraries may give none, without an error. One layer of each class is
    asked: ``g = W^T c`` for ``c = W d`` must have ``g . d = c . c``.

    Args:
        modules: all modules in question; one that holds others is passed over.
        dtype: of their inputs.

    Raises:
        UnsupportedModelError: naming the class.
    """
    asked = set()
    for module in modules:
        plain = getattr(module, "weight", None)
        if (
            type(module) in asked
            or not is_linear_like(module)
            or any(True for _ in module.children())
            or (type(plain) is nn.Parameter and plain.is_floating_point())
        ):
            continue
        asked.add(type(module))
        n, _ = linear_shape(module)
        tensors = itertools.chain(module.parameters(), module.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        x, d = torch.randn(2, 4, n, generator=generator).to(device, dtype)
        with torch.no_grad():
            c = (module(x + d) - module(x)).float()
        with torch.enable_grad():
            y = module(x.requires_grad_())
            g = None
            if y.requires_grad:
                (g,) = torch.autograd.grad(y, x, c.to(y.dtype), allow_unused=True)
        wanted = float(c.square().sum())
        if wanted == 0:
            continue
        found = 0.0 if g is None else float((g.float() * d.float()).sum()) / wanted
        if not abs(found - 1) < _GRADIENT_TOLERANCE:
            raise UnsupportedModelError(
                f"edit: layers above the edited ones must have gradients, got {found:.2f} times "
                f"the right one from {type(module).__name__} with a weight of type "
                f"{type(plain).__name__} on {device.type}; edit on another device, or the model in "
                "another form of quantisation"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with ``model`` in evaluation mode; every module then has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # Parents come first. Not by the attribute: a hook hands its mode on to what it wraps.
        for module, training in modes:
            module.train(training)
