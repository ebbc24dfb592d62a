"""The statistics of a model as one object, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.models import KEY_SITES, describe
from coachhook.statistics.packed import pack_lower, packed_order, unpack_lower
from coachhook.store import check_fields, fingerprint, load_folder, save_folder


class Covariances(Mapping[int, Tensor]):
    """Layer index -> second moment of its keys, float64 [n, n].

    Args:
        stored: layer index -> the matrix [n, n], or its packed lower triangle [n (n + 1) / 2],
            which is unpacked anew at each access.
    """

    def __init__(self, stored: Mapping[int, Tensor]) -> None:
        self._stored = {layer: stored[layer] for layer in sorted(stored)}

    def __getitem__(self, layer: int) -> Tensor:
        stored = self._find(layer)
        return unpack_lower(stored) if stored.ndim == 1 else stored.to(torch.float64)

    def __contains__(self, layer: object) -> bool:
        return layer in self._stored

    def __iter__(self) -> Iterator[int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def order(self, layer: int) -> int:
        """Return n of a layer, without making its matrix."""
        stored = self._find(layer)
        return packed_order(stored.numel()) if stored.ndim == 1 else stored.shape[0]

    def packed(self, layer: int, dtype: torch.dtype) -> Tensor:
        """Return the packed lower triangle of a layer on the CPU."""
        stored = self._find(layer)
        return stored.to(dtype) if stored.ndim == 1 else pack_lower(stored, dtype)

    def _find(self, layer: int) -> Tensor:
        if layer not in self._stored:
            raise ValueError(
                f"statistics: layer must be one of {list(self._stored)}, got {layer}; collect "
                "statistics that include it"
            )
        return self._stored[layer]


class Statistics:
    """Second moments of the keys of some layers, and a sample of the keys themselves.

    Made by :func:`collect_statistics`, :meth:`load` or :meth:`from_covariances`.

    Attributes:
        covariances: layer index -> float64 [n, n], the mean of k k^T, not centred. Statistics
            from disk build the matrix anew at each access, so that layers not in use take no
            memory. Do not change what you get. A layer that is not there raises ValueError.
        tokens: number of keys the means are taken over.
        samples: layer index -> [s, n] in the dtype of the keys: unrelated keys drawn uniformly
            from the text, the same tokens in all layers. May be empty.
        sample_tokens: int32 [s, 8], the ids up to and with each sampled token, -1 before the start
            of its text; None where they are not known.
        shrinkage: layer index -> rho, the share by which what correlates two features was taken
            away (:mod:`coachhook.statistics.shrinkage`); a layer that is not there was not shrunk.
        fingerprint: of the model they describe (:func:`coachhook.store.fingerprint`), or None.
        key_site: what the keys are inputs of, "down_proj" or "mlp" (see
            :class:`~coachhook.EditConfig`).
        meta: how they were made: model name, settings, number of texts.
    """

    def __init__(
        self,
        covariances: Mapping[int, Tensor],
        tokens: int,
        *,
        samples: Mapping[int, Tensor] | None = None,
        sample_tokens: Tensor | None = None,
        shrinkage: Mapping[int, float] | None = None,
        fingerprint: str | None = None,
        meta: Mapping[str, Any] | None = None,
        key_site: str = "down_proj",
    ) -> None:
        self.covariances = Covariances(covariances)
        self.tokens = tokens
        self.samples = dict(samples or {})
        self.shrinkage = dict(shrinkage or {})
        self.sample_tokens = sample_tokens
        self.fingerprint = fingerprint
        self.meta = dict(meta or {})
        self.key_site = key_site

    def __repr__(self) -> str:
        return (
            f"Statistics(layers={self.layers}, tokens={self.tokens}, "
            f"fingerprint={self.fingerprint!r})"
        )

    @property
    def layers(self) -> list[int]:
        """The layer indices, ascending."""
        return list(self.covariances)

    @classmethod
    def from_covariances(
        cls, covariances: Mapping[int, Tensor], tokens: int, *, key_site: str = "down_proj"
    ) -> Statistics:
        """Wrap second moments computed elsewhere.

        Args:
            covariances: layer index -> floating [n, n], the mean of k k^T, not centred, symmetric
                to rounding.
            tokens: number of keys the means are taken over.
            key_site: what the keys are inputs of, "down_proj" or "mlp".

        Raises:
            TypeError: an index is not an int, or a value not a floating-point tensor.
            ValueError: a matrix is not square, finite and symmetric; `tokens` is not positive;
                there is no matrix, or another `key_site`.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"from_covariances: tokens must be a positive int, got {tokens!r}")
        if not covariances:
            raise ValueError("from_covariances: covariances must hold a layer, got none")
        if key_site not in KEY_SITES:
            raise ValueError(
                f"from_covariances: key_site must be one of {', '.join(KEY_SITES)}, "
                f"got {key_site!r}"
            )
        for layer, matrix in covariances.items():
            _check_covariance(layer, matrix)
        return cls(covariances, tokens, key_site=key_site)

    def check(self, model: nn.Module) -> None:
        """Check that these statistics can be those of `model`.

        Raises:
            FingerprintMismatchError: they were taken from other weights; both fingerprints are
                named. Not checked where :attr:`fingerprint` is None.
            UnsupportedModelError: `model` has nothing that can be hooked at :attr:`key_site`.
            ValueError: a layer does not exist in `model` or has another width.
        """
        if self.fingerprint is not None and (found := fingerprint(model)) != self.fingerprint:
            raise FingerprintMismatchError(
                f"statistics: fingerprint must be {found}, that of the model given, got "
                f"{self.fingerprint}, that of {self.meta.get('model') or 'another model'}; collect "
                "statistics of this model or load the model they were taken from"
            )
        description = describe(model, self.key_site)
        for layer in self.covariances:
            n, expected = self.covariances.order(layer), description.layer(layer).in_features
            if n != expected:
                raise ValueError(
                    f"statistics: the covariance of layer {layer} must be [{expected}, {expected}] "
                    f"for this model, got [{n}, {n}]; collect statistics of this model"
                )

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> None:
        """Write a folder, whole or not at all; statistics already there are replaced.

        Args:
            path: a new or empty folder, or one of statistics.
            dtype: torch.float64, or torch.float32 for half the size. The lower triangles are
                stored, one after another, so no second set of matrices is in memory.

        Raises:
            ValueError: another `dtype`, or `path` cannot be written.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"save: dtype must be torch.float64 or torch.float32, got {dtype}")
        tensors: dict[str, Tensor | Callable[[], Tensor]] = {
            _covariance_name(layer): partial(self.covariances.packed, layer, dtype)
            for layer in self.layers
        }
        tensors |= {_sample_name(layer): sample for layer, sample in self.samples.items()}
        if self.sample_tokens is not None:
            tensors[_SAMPLE_TOKENS] = self.sample_tokens
        manifest = {
            "model": self.meta.get("model"),
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "key_site": self.key_site,
            "layers": self.layers,
            "sampled_layers": sorted(self.samples),
            "shrinkage": {str(layer): rho for layer, rho in self.shrinkage.items()},
            "dtype": str(dtype).removeprefix("torch."),
            "meta": self.meta,
        }
        save_folder(path, kind="statistics", manifest=manifest, tensors=tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Open a folder written by :meth:`save`; a layer is read when it is first used.

        Raises:
            FormatError: the folder does not exist, is damaged, or not one of statistics.
        """
        manifest, tensors = load_folder(path, "statistics")
        fields: dict[str, type | tuple[type, ...]] = {
            "fingerprint": (str, type(None)),
            "tokens": int,
            "layers": list,
            "sampled_layers": list,
            "meta": dict,
            "shrinkage": dict,
            "key_site": str,
        }
        # Folders of before these existed are not shrunk, and of down-projections.
        manifest = {"shrinkage": {}, "key_site": KEY_SITES[0], **manifest}
        check_fields(manifest, fields, path)
        if manifest["key_site"] not in KEY_SITES:
            raise FormatError(
                f"load: {path} must have a key_site of {', '.join(KEY_SITES)}, got "
                f"{manifest['key_site']!r}"
            )
        try:
            shrinkage = {int(i): float(rho) for i, rho in manifest["shrinkage"].items()}
            covariances = {i: tensors[_covariance_name(i)] for i in manifest["layers"]}
            samples = {i: tensors[_sample_name(i)] for i in manifest["sampled_layers"]}
            for packed in covariances.values():
                packed_order(packed.numel())
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"load: {path} must hold every layer of its manifest whole, got: {error}"
            ) from error
        return cls(
            covariances,
            manifest["tokens"],
            samples=samples,
            sample_tokens=tensors[_SAMPLE_TOKENS] if _SAMPLE_TOKENS in tensors else None,
            shrinkage=shrinkage,
            fingerprint=manifest["fingerprint"],
            meta=manifest["meta"],
            key_site=manifest["key_site"],
        )


_SAMPLE_TOKENS = "sample_tokens"


def _covariance_name(layer: int) -> str:
    return f"layer.{layer}.covariance"


def _sample_name(layer: int) -> str:
    return f"layer.{layer}.sample"


def _check_covariance(layer: object, matrix: object) -> None:
    where = "from_covariances: covariances"
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{where} must be keyed by int layer indices, got {layer!r}")
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        found = str(matrix.dtype) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{where}[{layer}] must be a floating-point tensor, got {found}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{where}[{layer}] must be square [n, n], got {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{where}[{layer}] must be finite, got NaN or Inf")
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    asymmetry = float((matrix - matrix.T).abs().max()) if matrix.numel() else 0.0
    # Products summed in the dtype of the matrix differ between the halves by their rounding.
    if asymmetry > 1e3 * torch.finfo(matrix.dtype).eps * scale:
        raise ValueError(
            f"{where}[{layer}] must be symmetric, got halves that differ by {asymmetry:.3g}; "
            "pass (C + C.T) / 2 if that is rounding"
        )
