"""Edits as plain weights, ``W0 + Delta``, or as a LoRA adapter: for software without hooks.

What is lost is the gate. Plain weights correct every token of every text, and with the membership
gate by the sum of all edits, where the hook adds that of one. What this costs is measured on
the facts that the folder of edits holds, before anything is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coachhook import bundled
from coachhook._version import __version__
from coachhook.editing.attach import attach
from coachhook.editing.config import EditConfig
from coachhook.editing.folder import load_payloads, load_state
from coachhook.editing.requests import EditRequest
from coachhook.evaluation.metrics import Edits, evaluate, long_prompts
from coachhook.hooks.hook_set import attached_hooks
from coachhook.integrations.corrections import (
    Correction,
    Spectrum,
    correction_of,
    matrix,
    relative_error,
)
from coachhook.integrations.lora import LoraAdapter, adapter_dtype, adapter_in, import_peft
from coachhook.integrations.merged import MergedWeights
from coachhook.models import check_whole, describe, get_submodule, weight_of
from coachhook.statistics import read_texts
from coachhook.store import check_writable, fingerprint, read_manifest, write_folder_atomically
from coachhook.store.strict_json import to_json

FORMATS = ("merged", "lora")
NOTE = (
    "the gate is not part of an export: the correction acts on every token of every text; "
    "coachhook.attach(model, EDITS) keeps the gate"
)
# Beside what is exported, so that whoever is given the folder can read what it lost.
REPORT = "coachhook_export.json"
# An answer is right where the continuation begins with it, and local where ten tokens are the same.
_NEW_TOKENS = 12


class Export:
    """An export whose input has been checked; :meth:`run` measures and writes it.

    Takes the arguments of :func:`export_edits` and raises what it raises before it starts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        edits: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        format: str = "merged",
        rank: int | None = None,
        covariance_weight: float | None = None,
        measure: int = 100,
        text: Any = None,
        text_tokens: int = 10_000,
        progress: bool = True,
    ) -> None:
        check_export(
            out, format=format, rank=rank, covariance_weight=covariance_weight, measure=measure
        )
        if not isinstance(text_tokens, int) or text_tokens < 2:
            raise ValueError(f"export: text_tokens must be an integer from 2, got {text_tokens!r}")
        check_whole("export", model)
        self._model, self._tokenizer = model, tokenizer
        self._edits, self._out, self._format = Path(edits), Path(out), format
        self._asked, self._text_tokens, self._progress = measure, text_tokens, progress
        if (hooks := attached_hooks(model)) is not None:
            raise ValueError(
                f"export: model must have no hooks attached, got hooks at layers {list(hooks)}; "
                "detach them"
            )
        config, payloads = load_payloads(edits, fingerprint(model))
        self._requests = _stored_requests(edits)
        if not self._requests:
            raise ValueError(f"export: edits must hold at least one batch, got none in {edits}")
        self._text_name = "bundled" if text is None else _name_of(text)
        subjects = {request.subject for request in self._requests}
        source = bundled.texts() if text is None else text
        self._texts = _unrelated(source, subjects, text_tokens)
        description = describe(model, config.key_site)
        self._paths = {layer: description.layer(layer).path for layer in payloads}
        self._weights = {layer: _plain_weight(model, path) for layer, path in self._paths.items()}
        # Now: while the export is measured the weights are merged.
        self._norms = {x: float(w.detach().cpu().double().norm()) for x, w in self._weights.items()}
        self._weight = covariance_weight
        self._corrections: dict[int, Correction] = (
            {layer: correction_of(payload) for layer, payload in payloads.items()}
            if covariance_weight is None
            else _fitted_again(edits, config, covariance_weight)
        )
        self._factors = self._cut(rank) if format == "lora" else {}

    def run(self) -> dict[str, Any]:
        """Measures and writes; returns what :func:`export_edits` does."""
        found = None
        if requests := self._chosen():
            with attach(self._model, self._edits) as handle:
                found = self._measure(requests, handle.hooks)
        with self._exported() as exported:
            if found is not None:
                measured = {
                    **_counts(found, self._text_name),
                    "unedited": _state(found, "before"),
                    "gated": _state(found, "after"),
                    "exported": _state(self._measure(requests, exported), "after"),
                }
            report = self._report(exported, measured if found is not None else None)
            write_folder_atomically(self._out, lambda folder: self._write(folder, exported, report))
        report["bytes"] = sum(f.stat().st_size for f in self._out.rglob("*") if f.is_file())
        return report

    def _cut(self, rank: int | None) -> dict[int, tuple[Tensor, Tensor]]:
        """B and A of each layer, in the dtype that peft keeps them in."""
        spectra = {layer: Spectrum(c) for layer, c in self._corrections.items()}
        dtypes = {layer: adapter_dtype(weight) for layer, weight in self._weights.items()}
        ranks = {layer: s.rank(self._weights[layer], dtypes[layer]) for layer, s in spectra.items()}
        # One rank for all layers: which layer a pattern of ranks means has changed in peft.
        rows = max(ranks.values()) if rank is None else min(rank, max(ranks.values()))
        factors = {}
        for layer, spectrum in spectra.items():
            b, a = spectrum.cut(ranks[layer], rows)
            factors[layer] = b.to(dtypes[layer]), a.to(dtypes[layer])
        return factors

    def _chosen(self) -> list[EditRequest]:
        """The facts to ask for, evenly spread over the batches."""
        if not self._asked:
            return []
        too_long = long_prompts(self._model, self._tokenizer, self._requests)
        fitting = [r for i, r in enumerate(self._requests) if i not in too_long]
        count = min(self._asked, len(fitting))
        return [fitting[i * len(fitting) // count] for i in range(count)]

    def _measure(self, requests: Sequence[EditRequest], edits: Edits) -> dict[str, Any]:
        return evaluate(
            self._model,
            self._tokenizer,
            requests,
            hooks=edits,
            max_new_tokens=_NEW_TOKENS,
            text=self._texts,
            text_tokens=self._text_tokens,
            progress=self._progress,
        )

    @contextmanager
    def _exported(self) -> Iterator[MergedWeights | LoraAdapter]:
        """A block in which the model is what is exported."""
        if self._format == "merged":
            with MergedWeights(self._weights, self._corrections) as merged:
                yield merged
        else:
            named = {self._paths[layer]: pair for layer, pair in self._factors.items()}
            with adapter_in(self._model, named) as adapter:
                yield adapter

    def _report(
        self, exported: MergedWeights | LoraAdapter, measured: dict[str, Any] | None
    ) -> dict[str, Any]:
        layers = []
        for layer, correction in self._corrections.items():
            delta = matrix(correction)
            entry: dict[str, Any] = {
                "layer": layer,
                "module": self._paths[layer],
                "weight_norm": self._norms[layer],
                "delta_norm": float(delta.norm()),
            }
            if isinstance(exported, MergedWeights):
                entry["error"] = exported.errors[layer]
            else:
                b, a = self._factors[layer]
                entry["rank"] = len(a)
                entry["error"] = relative_error(b.double() @ a.double(), delta, delta)
            layers.append(entry)
        return {
            "format": self._format,
            "out": str(self._out),
            "edits": len(self._requests),
            "dtype": str(next(iter(self._weights.values())).dtype).removeprefix("torch."),
            "covariance_weight": self._weight,
            "layers": layers,
            "gate": False,
            "note": NOTE,
            "measured": measured,
        }

    def _write(
        self, folder: Path, exported: MergedWeights | LoraAdapter, report: dict[str, Any]
    ) -> None:
        if isinstance(exported, LoraAdapter):
            exported.save(folder)
        else:
            model: Any = self._model
            model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
        file = folder / REPORT
        content = {"coachhook_version": __version__, **report}
        file.write_text(to_json(content) + "\n", encoding="utf-8")
        mode = file.stat().st_mode
        for other in folder.rglob("*"):
            if other.is_file():
                other.chmod(mode)  # safetensors leaves files for their owner alone


def export_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "merged",
    rank: int | None = None,
    covariance_weight: float | None = None,
    measure: int = 100,
    text: Any = None,
    text_tokens: int = 10_000,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes edits without their gate, as a merged model or as a LoRA adapter, and what that costs.

    Args:
        model: the model the edits were made for, in any dtype, without hooks; left as it was.
        tokenizer: its tokenizer.
        edits: an EDITS folder.
        out: a folder that does not exist yet, or an empty one.
        format: "merged": model and tokenizer by ``save_pretrained``, the edited layers holding
            ``W0 + Delta``, summed in float64 and rounded once to the model's dtype. "lora": an
            adapter of peft with ``B A = Delta`` at the edited layers, float32 (float64 for a
            float64 model), scaling 1.
        rank: of the adapter, at most; the best approximation of that rank. None: all that Delta
            has above the rounding of the weight.
        covariance_weight: None takes Delta as the hooks hold it. A number fits it to the stored
            keys and targets again with this lambda; larger ones than the edits' own keep more of
            other text (docs/export.md). Only for the scope "membership".
        measure: most facts of the folder that are asked for; 0 measures nothing.
        text: unrelated text, as for :func:`coachhook.statistics.read_texts`; texts that name an
            edited subject are left out. None takes the bundled model's.
        text_tokens: tokens of it to use.
        progress: show progress bars on stderr.

    Returns:
        A JSON-ready object: ``format``, ``out``, ``edits`` (facts in the folder), ``dtype``,
        ``covariance_weight``, ``gate`` (False), ``note``, ``bytes``; ``layers``, each with
        ``layer``, ``module``, ``weight_norm``, ``delta_norm``, ``rank`` (lora), and ``error``, the
        part of Delta that rounding or the rank leaves out, relative to it; ``measured``, None or
        ``facts``, ``paraphrases``, ``neighborhood``, ``text``, ``text_tokens``, and for the states
        ``unedited``, ``gated`` and ``exported`` ``generated`` and ``teacher_forced`` (reliability,
        generality, locality, see :mod:`coachhook.evaluation.metrics`), ``perplexity``,
        ``perplexity_ratio`` and ``unchanged`` (share of the text's places with the same most likely
        next token). All but ``bytes`` is in the folder, too.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
        FingerprintMismatchError: the edits belong to other weights.
        ImportError: format "lora", and peft is not installed.
        UnsupportedModelError: several processes hold the model together.
        ValueError: another argument does not fit. So far nothing was written.
        OSError: the folder could not be written; nothing is left of it.
    """
    export = Export(
        model,
        tokenizer,
        edits,
        out,
        format=format,
        rank=rank,
        covariance_weight=covariance_weight,
        measure=measure,
        text=text,
        text_tokens=text_tokens,
        progress=progress,
    )
    return export.run()


def check_export(
    out: str | os.PathLike[str],
    *,
    format: str,
    rank: int | None = None,
    covariance_weight: float | None = None,
    measure: int = 0,
) -> None:
    """Checks what can be checked without the model; see :func:`export_edits`."""
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if rank is not None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"export: rank must be a positive integer, got {rank!r}")
        if format != "lora":
            raise ValueError(f"export: rank must be None for format {format!r}, got {rank}")
    if covariance_weight is not None and not (
        math.isfinite(covariance_weight) and covariance_weight > 0
    ):
        raise ValueError(
            f"export: covariance_weight must be positive and finite, got {covariance_weight}"
        )
    if not isinstance(measure, int) or measure < 0:
        raise ValueError(f"export: measure must be an integer from 0, got {measure!r}")
    check_writable(out)
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise ValueError(
            f"export: out must be a new or empty folder, got {out} with files in it; choose "
            "another name or delete it"
        )
    if format == "lora":
        import_peft()


def _name_of(text: Any) -> str:
    return os.fspath(text) if isinstance(text, (str, os.PathLike)) else "given"


def _unrelated(text: Any, subjects: set[str], tokens: int) -> list[str]:
    """Texts that name no edited subject, as many as could be needed.

    In a list: they are read more than once, and standard input is not.
    """
    unrelated = (t for t in read_texts(text) if not any(subject in t for subject in subjects))
    found = list(islice(unrelated, tokens))
    if not found:
        raise ValueError(
            "export: text must hold text that names no edited subject, got none in "
            f"{_name_of(text)}"
        )
    return found


def _stored_requests(edits: str | os.PathLike[str]) -> list[EditRequest]:
    """The facts of a folder, oldest first; of several about one prompt, the one that holds."""
    batches = read_manifest(edits, "edits")["batches"].values()
    requests = [EditRequest.from_dict(r) for batch in batches for r in batch["requests"]]
    return list({request.text: request for request in requests}.values())


def _plain_weight(model: nn.Module, path: str) -> Tensor:
    module = get_submodule(model, path)
    weight = weight_of(module)
    if weight is None:
        raise ValueError(
            f"export: {path} must have a plain weight, got {type(module).__name__}; quantised "
            "layers have none, nor have those with adapters, the experts of a block, and the whole "
            "MLPs that edits of key_site 'mlp' lie over"
        )
    return weight


def _fitted_again(
    edits: str | os.PathLike[str], config: EditConfig, weight: float
) -> dict[int, Correction]:
    if config.scope != "membership":
        raise ValueError(
            "export: covariance_weight must be None for edits of another scope than 'membership', "
            f"got {weight:g} for {config.scope!r}; edit with this weight instead"
        )
    state = load_state(edits)
    return {layer: state.fitted_again(layer, weight) for layer in state.layers}


def _counts(result: dict[str, Any], text: str) -> dict[str, Any]:
    counts = result["counts"]
    return {
        "facts": counts["requests"],
        "paraphrases": counts["paraphrases"],
        "neighborhood": counts["neighborhood"],
        "text": text,
        "text_tokens": result["language"]["tokens"],
    }


def _state(result: dict[str, Any], state: str) -> dict[str, Any]:
    language = result["language"]
    before = state == "before"
    return {
        "generated": result["generated"][state],
        "teacher_forced": result["teacher_forced"][state],
        "perplexity": language["perplexity"][state],
        "perplexity_ratio": 1.0 if before else language["perplexity"]["ratio"],
        "unchanged": 1.0 if before else language["unchanged"],
    }
