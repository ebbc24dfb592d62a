"""Collecting the statistics of a model from text, in one pass for all layers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from tqdm import tqdm

from coachhook.models import (
    EditableLayer,
    ModelDescription,
    check_whole,
    describe,
    fused_activations,
)
from coachhook.statistics.accumulate import KeySums, frozen
from coachhook.statistics.batches import TokenStream, make_batches
from coachhook.statistics.checkpoint import Checkpoint, Position, window_digest
from coachhook.statistics.container import Statistics
from coachhook.statistics.share import Share
from coachhook.statistics.texts import TextSource, read_texts
from coachhook.store import fingerprint

_LOG = logging.getLogger(__name__)

# Texts are sorted by length within so many batches: 5 % of padding on sentences, 13 % with 8.
_WINDOW_BATCHES = 32
_LONGEST_TEXT = 8192
# Of the minimal mode, for the widest layer.
_TOKENS_PER_FEATURE = 10
_LARGE = 16 * 2**30


def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    texts: TextSource,
    layers: Iterable[int] | None = None,
    max_tokens: int | None = None,
    *,
    minimal: bool = False,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    sample_size: int = 4096,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 300.0,
    key_site: str = "down_proj",
) -> Statistics:
    """Measure the second moment of the keys of `model` over `texts`, all layers in one pass.

    A key is the input of a layer's down-projection (or MLP) for one token; of all tokens, special
    ones included, ``Cov = (1 / N) sum_t k_t k_t^T`` in float64. Each text is a sequence of its own.
    Texts are read as a stream, sorted by length within a window and batched; the forward ends at
    the last layer wanted. A float64 model is measured in float64 throughout, any other in float32
    per batch and float64 across batches. Edits attached to the model are off meanwhile: the
    statistics are those of the frozen model. The result depends on the texts and the settings
    alone (and, by rounding, on the device and its number of threads).

    Where ``torch.distributed`` is initialised, all processes of the default group must call this,
    with the same model, texts and settings. Each reads all texts; of N processes each runs every
    N-th batch, and at the end the sums are added up. All return the same statistics: tokens and
    sample are those of one process (the sample bit for bit where the processes compute alike), the
    covariances differ from those of one process by the order of float64 sums alone. An error in one
    process is raised there; the others wait for it until their group's timeout, or until the
    launcher ends them, as torchrun does.

    Args:
        model: a causal language model; left as it was.
        tokenizer: its tokenizer.
        texts: a path ("-": standard input) or an iterable, see :func:`read_texts`.
        layers: indices of the layers wanted; None for all.
        max_tokens: stop after this many tokens, cutting the last text; None for all the text.
        minimal: for a quick start: `max_tokens` defaults to 10 times the width of the widest layer
            wanted, and the covariances are shrunk towards uncorrelated features by as much as two
            random halves of the texts disagree (:mod:`coachhook.statistics.shrinkage`). How much is
            in ``.shrinkage``. Takes texts to be independent of one another, and twice the memory.
        batch_tokens: tokens in a forward pass, padding included; with `max_length` this bounds the
            memory needed. Default: 8192, and 2048 on the CPU, where activations of more leave the
            caches. A text that is longer is a batch of its own.
        max_length: texts are cut to this many tokens. Default: the context window of the model,
            at most 8192. How many were cut is logged and kept in ``.meta``.
        sample_size: keys kept per layer as a sample of unrelated text; 0 for none.
        progress: show a progress bar with the time left on standard error.
        checkpoint_dir: a folder to save the state in every `checkpoint_seconds` and at the end.
            Delete it when the statistics are saved. Processes have a folder each in there.
        resume: go on from `checkpoint_dir` where it holds a state. The result is the same, bit
            for bit, as that of a run that was never stopped. Texts that had been read must be as
            they were; those behind them may have changed, and are read as they are now.
        checkpoint_seconds: time between two states.
        key_site: "down_proj", or "mlp" for the keys that the whole MLP reads, of width d; edits
            with these statistics are made there (see :class:`~coachhook.EditConfig`).

    Returns:
        :class:`Statistics` with the fingerprint of `model`, on the CPU.

    Raises:
        TypeError: `texts` is not a source of texts, `layers` not a list of int.
        ValueError: a setting is out of range, a layer does not exist, the texts hold nothing (or
            a single one, for the minimal mode), the tokenizer does not fit, a key is NaN or
            infinite, `checkpoint_dir` cannot be written or holds the state of another run,
            processes were given different texts or settings.
        FingerprintMismatchError: `checkpoint_dir` holds the state of a run on other weights.
        FormatError: the state in `checkpoint_dir` is damaged.
        UnsupportedModelError: the model has no layers that can be edited, or the processes hold it
            together (tensor parallelism, FSDP2) instead of whole in each.
    """
    check_whole("collect_statistics", model)
    description = describe(model, key_site)
    chosen = _chosen_layers(description, layers)
    share = Share.of_default_group()
    first_parameter = next(model.parameters())
    if batch_tokens is None:
        batch_tokens = 2048 if first_parameter.device.type == "cpu" else 8192
    _check_count("batch_tokens", batch_tokens, 1)
    _check_count("sample_size", sample_size, 0)
    if max_tokens is not None:
        _check_count("max_tokens", max_tokens, 1)
    elif minimal:
        max_tokens = _TOKENS_PER_FEATURE * max(layer.in_features for layer in chosen)
    max_length = _checked_max_length(max_length, description.max_positions)
    if resume and checkpoint_dir is None:
        raise ValueError("collect_statistics: checkpoint_dir must be given to resume, got None")
    if share.processes > 1 and texts == "-":
        raise ValueError(
            "collect_statistics: texts must be a source that every process can read, got standard "
            "input, which only one can; write it to a file"
        )
    room = (1 + minimal) * sum(8 * layer.in_features**2 for layer in chosen)
    if room > _LARGE and share.rank == 0:
        _LOG.warning(
            "the sums of %d layers take %.0f GiB; name fewer layers if that is too much",
            len(chosen),
            room / 2**30,
        )
    weights = fingerprint(model)
    settings = {
        "dtype": str(first_parameter.dtype).removeprefix("torch."),
        "vocabulary": len(tokenizer),
        "layers": [layer.index for layer in chosen],
        "key_site": key_site,
        "minimal": minimal,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
        "max_length": max_length,
        "sample_size": sample_size,
        "processes": share.processes,
    }
    share.check_equal({"fingerprint": weights, **settings})
    checkpoint = Checkpoint(
        checkpoint_dir, {"fingerprint": weights, **settings}, checkpoint_seconds, share
    )
    reader = read_texts(texts)
    stream = TokenStream(
        reader,
        tokenizer,
        max_length=max_length,
        max_tokens=max_tokens,
        window_tokens=_WINDOW_BATCHES * batch_tokens,
    )
    sums = KeySums(model, description, chosen, sample_size, halves=minimal)
    resumed = checkpoint.restore(stream, sums) if resume else None
    bar = tqdm(
        desc="key statistics",
        unit="tok",
        unit_scale=True,
        # The stream stands before the window of the state, of which some batches are done.
        initial=stream.counts["tokens"] + (0 if resumed is None else resumed.tokens),
        disable=not progress or share.rank > 0,
        file=sys.stderr,
    )
    with frozen(model), fused_activations(model), bar:
        while True:
            before = Position(dict(stream.counts), stream.digest)
            window = stream.window()
            if resumed is not None:
                checkpoint.check_window(resumed, window)
            if not window:
                bar.total = stream.counts["tokens"]  # expected until now
                break
            bar.total = _expected_tokens(stream.counts["tokens"], reader.fraction, max_tokens)
            batches = make_batches(window, before.counts["tokens"], batch_tokens, halves=minimal)
            first = resumed.batches if resumed is not None else 0
            for done, batch in enumerate(batches[first:], start=first + 1):
                if share.takes(done):
                    sums.add(batch)
                else:
                    sums.skip(batch)
                bar.update(len(batch.positions))
                due = checkpoint.is_due()
                # Looking at the sums waits for the device, so not after every batch.
                if due or done in (1, len(batches)):
                    sums.check_finite()
                if due:
                    tokens = sum(len(batch.positions) for batch in batches[:done])
                    now = Position(before.counts, before.texts, done, window_digest(window), tokens)
                    checkpoint.save(now, sums)
            resumed = None
    counts = stream.counts
    if not counts["tokens"]:
        raise ValueError("collect_statistics: texts must hold text, got none")
    sums.check_halves(share)
    checkpoint.save(before, sums)
    share.check_equal({"texts": stream.digest})
    sums.merge(share)
    if counts["truncated"] and share.rank == 0:
        _LOG.warning(
            "%d of %d texts were longer than %d tokens and were cut",
            counts["truncated"],
            counts["used"],
            max_length,
        )
    means, shrinkage = sums.means()
    samples, sample_tokens = sums.samples()
    meta = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "texts": counts["used"],
        "truncated": counts["truncated"],
        **settings,
    }
    return Statistics(
        means,
        sums.tokens,
        samples=samples,
        sample_tokens=sample_tokens,
        shrinkage=shrinkage,
        fingerprint=weights,
        meta=meta,
        key_site=key_site,
    )


def _chosen_layers(
    description: ModelDescription, layers: Iterable[int] | None
) -> list[EditableLayer]:
    if layers is None:
        return description.layers
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"collect_statistics: layers must be a list of int, got {layers!r}")
    chosen = {index: description.layer(index) for index in layers}
    if not chosen:
        raise ValueError("collect_statistics: layers must name a layer, got none")
    return [chosen[index] for index in sorted(chosen)]


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"collect_statistics: {name} must be an int >= {least}, got {value!r}")


def _checked_max_length(max_length: int | None, max_positions: int | None) -> int:
    if max_length is None:
        return min(max_positions or _LONGEST_TEXT, _LONGEST_TEXT)
    _check_count("max_length", max_length, 1)
    if max_positions is not None and max_length > max_positions:
        raise ValueError(
            f"collect_statistics: max_length must be at most {max_positions}, the context window "
            f"of the model, got {max_length}"
        )
    return max_length


def _expected_tokens(tokens: int, fraction: float | None, max_tokens: int | None) -> int | None:
    """The tokens of the whole run, from how much of the source those so far have taken."""
    if not fraction:
        return max_tokens
    expected = round(tokens / min(fraction, 1.0))
    return expected if max_tokens is None else min(expected, max_tokens)
