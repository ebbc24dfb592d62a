"""Models whose weights are quantised: hooks need what a layer reads and gives, not its weight."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import coachhook
from coachhook import Editor, EditRequest, collect_statistics
from coachhook.bundled import texts
from coachhook.errors import FingerprintMismatchError, UnsupportedModelError
from coachhook.hooks import attach_hooks
from coachhook.models import check_finite, get_submodule, linear_shape, load_model, set_submodule
from coachhook.models import describe as describe_model
from coachhook.store import fingerprint
from tests.models.families import tiny


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of int8 and the scale of each."""
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A weight in buffers, as GPTQ's and AWQ's layers have it; no parameter at all."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, scale = quantise(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed * self.scale, self.bias)


class Int8Weight(torch.Tensor):
    """A weight that answers to products alone, as torchao's do."""

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> Int8Weight:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.packed * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        raise NotImplementedError(f"Int8Weight: {func}")


def in_buffers(model: nn.Module) -> nn.Module:
    """The model with every linear layer, the head too, replaced."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        is_conv = type(module).__name__ == "Conv1D"
        if is_conv or isinstance(module, nn.Linear):
            weight = module.weight.t() if is_conv else module.weight
            set_submodule(model, path, Int8Linear(weight, module.bias))
    return model


def in_subclasses(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed, scale = quantise(module.weight)
            module.weight = nn.Parameter(Int8Weight(packed, scale), requires_grad=False)
    return model


def test_a_model_without_float_matrices_is_edited(bundled, requests, tmp_path: Path) -> None:
    plain, tokenizer, _ = bundled
    model = in_buffers(plain)
    path = describe_model(model).layers[0].path
    assert not list(get_submodule(model, path).parameters())
    statistics = collect_statistics(
        model, tokenizer, texts(), layers=[0, 1, 2], max_tokens=8_000, progress=False
    )
    ids = tokenizer(requests[0].text, return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).logits
    editor = Editor(model, tokenizer, statistics=statistics)
    assert all(editor.edit(requests[:4]).converged)

    def answers(edited: nn.Module) -> list[str]:
        found = []
        for request in requests[:4]:
            prompt = tokenizer(request.text, return_tensors="pt")
            out = edited.generate(**prompt, max_new_tokens=4, do_sample=False)
            found.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]).strip())
        return found

    got = answers(model)
    assert all(a.startswith(r.target_new) for a, r in zip(got, requests[:4], strict=True))
    editor.save(tmp_path / "edits")
    editor.detach()
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, before)
    with coachhook.attach(in_buffers(plain), tmp_path / "edits") as handle:
        assert answers(handle._model) == got
    with pytest.raises(FingerprintMismatchError):
        coachhook.attach(copy.deepcopy(plain), tmp_path / "edits")


def test_a_fingerprint_covers_quantised_weights() -> None:
    base = tiny("llama")
    for make in (in_buffers, lambda model: in_subclasses(copy.deepcopy(model))):
        model, other = make(base), make(base)
        assert fingerprint(model) == fingerprint(other) != fingerprint(base)
        module = other.model.layers[1].mlp.down_proj
        packed = getattr(module, "packed", None)
        (module.weight.packed if packed is None else packed)[0, 0] += 1
        assert fingerprint(model) != fingerprint(other)


def test_a_hook_lies_over_a_weight_that_answers_to_products_alone() -> None:
    model = in_subclasses(tiny("llama"))
    check_finite(model)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        hooks = attach_hooks(model, [0])
        hooks[0].set_delta(torch.randn(hooks[0].out_features, hooks[0].in_features))
        hooks[0].set_alpha(0.5)
        hooks[0].state = "validated"
        assert not torch.equal(model(ids).logits, before)
        hooks.detach()
        assert torch.equal(model(ids).logits, before)
    model.model.layers[1].mlp.up_proj.weight.scale[3] = float("nan")
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in model\.layers\.1\.mlp"):
        check_finite(model)


class Untaught(torch.autograd.Function):
    """A kernel without a derivative, which torch takes for a constant or for zero."""

    @staticmethod
    def forward(ctx, y: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        if kind == "constant":
            ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 0, None


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_layers_without_gradients_are_refused(bundled, requests, monkeypatch, kind: str) -> None:
    """Their targets would converge all the same, by what the residual stream lets through."""
    plain, tokenizer, statistics = bundled
    model = in_buffers(plain)
    monkeypatch.setattr(statistics, "check", lambda _model: None)
    editor = Editor(model, tokenizer, statistics=statistics)
    product = Int8Linear.forward
    monkeypatch.setattr(
        Int8Linear, "forward", lambda self, x: Untaught.apply(product(self, x), kind)
    )
    message = r"must have gradients, got 0\.00 times the right one from Int8Linear .* on cpu"
    with pytest.raises(UnsupportedModelError, match=message):
        editor.edit(requests[:2])
    assert not editor.batches
    monkeypatch.undo()
    assert all(editor.edit(requests[:2]).converged)


def test_what_a_token_takes_does_not_depend_on_how_weights_are_stored() -> None:
    from coachhook.editing.suffix import Suffix

    def sizes(model: nn.Module) -> tuple[int, int]:
        suffix = Suffix(model, describe_model(model), 0)
        return suffix.bytes_per_token, suffix.bytes_per_kept_token

    base = tiny("llama")
    assert sizes(in_buffers(base)) == sizes(base)


def torchao(model: nn.Module) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(model: nn.Module) -> nn.Module:
    library = importlib.import_module("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


@pytest.mark.parametrize("module, make", [("torchao", torchao), ("optimum.quanto", quanto)])
def test_models_of_quantisation_libraries_are_edited(shared_dir: Path, module: str, make) -> None:
    pytest.importorskip(module)
    model, tokenizer = load_model(shared_dir / "models" / "factlm-llama")
    model = make(model)
    assert linear_shape(model.model.layers[0].mlp.down_proj) == (960, 320)
    corpus = (shared_dir / "data" / "corpus.txt").read_text().splitlines()
    statistics = collect_statistics(model, tokenizer, corpus, max_tokens=4_000, progress=False)
    records = json.loads((shared_dir / "data" / "counterfact_dev.json").read_text())[:4]
    facts = [
        EditRequest(rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"])
        for rewrite in (record["requested_rewrite"] for record in records)
    ]
    assert all(Editor(model, tokenizer, statistics=statistics).edit(facts).converged)
