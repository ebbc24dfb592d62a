"""The Editor: requests in, hooks of the model updated, a batch whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.beginnings import Beginnings
from coachhook.editing.config import EditConfig, check_layers
from coachhook.editing.cue_tokens import cue_distances
from coachhook.editing.cues import read_cues
from coachhook.editing.encoding import EncodedRequest, encode_requests
from coachhook.editing.folder import load_state, save_state
from coachhook.editing.leaning import leaned_on
from coachhook.editing.memories import check_site, new_memory
from coachhook.editing.memory import EditMemory
from coachhook.editing.problem import Earlier
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place
from coachhook.editing.reading import (
    States,
    answered,
    mean_keys,
    read_inputs,
    read_states,
    read_up_to,
    whole_scores,
)
from coachhook.editing.records import BatchRecord
from coachhook.editing.requests import EditRequest, check_kind, check_requests
from coachhook.editing.result import (
    EditResult,
    contradictory,
    lost,
    replaced,
    shut,
    unwritten,
)
from coachhook.editing.rewordings import find_rewordings
from coachhook.editing.state import EditState, LayerEdits
from coachhook.editing.suffix import Suffix
from coachhook.editing.targets import Targets, optimise_targets
from coachhook.editing.ties import Ties, find_ties
from coachhook.editing.unrelated import Ending, SampleTokens, endings
from coachhook.editing.word_ends import word_continuing_tokens
from coachhook.hooks import HookSet, attach_hooks
from coachhook.models import (
    check_finite,
    check_padding,
    check_whole,
    describe,
    end_tokens,
    evaluating,
    fused_activations,
    get_submodule,
    linear_shape,
    planless_attention,
    prepare_tokenizer,
)
from coachhook.statistics import Statistics
from coachhook.store import fingerprint


class Editor:
    """Edits facts of a causal language model in consecutive batches.

    The model's weights are not touched: hooks over the down-projections of ``config.layers`` are
    attached to the model given, and while they are, ``model(...)`` and ``model.generate(...)``
    answer with the edits.

    Args:
        model: a transformers causal language model.
        tokenizer: its (fast) tokenizer.
        statistics: key covariances of at least the edited layers.
        config: settings; the default preset for the model if None.

    Attributes:
        hooks: layer index -> :class:`~coachhook.hooks.HookedLinear`.

    Raises:
        FingerprintMismatchError: the statistics belong to other weights.
        NotPositiveDefiniteError: a covariance is singular (too few tokens).
        TypeError: statistics or config are something else.
        UnsupportedModelError: nothing editable was found, or several processes hold the model
            together (tensor parallelism, FSDP2).
        ValueError: a layer or its statistics are missing, or a weight is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        statistics: Statistics,
        config: EditConfig | None = None,
    ) -> None:
        check_whole("Editor", model)
        if config is None:
            config = EditConfig.for_model(
                model, key_site=getattr(statistics, "key_site", "down_proj")
            )
        check_kind("Editor: statistics", statistics, Statistics)
        check_kind("Editor: config", config, EditConfig)
        description = describe(model, config.key_site)
        check_layers(config, description)
        check_finite(model)
        statistics.check(model)
        check_site(model, statistics, config, description)
        layers = {}
        for layer in config.layers:
            sample = statistics.samples.get(layer)
            if sample is not None and config.scope == "membership":
                sample = sample.bfloat16()  # coefficients to 1 in 256 are enough
            memory = new_memory(model, description.layers[layer], statistics, config)
            layers[layer] = LayerEdits(memory, sample)
        tokens = statistics.sample_tokens
        known = SampleTokens(tokens) if tokens is not None else None
        self._start(model, tokenizer, EditState(config, layers, sample_tokens=known))

    def _start(self, model: nn.Module, tokenizer: Any, state: EditState) -> None:
        self._model = model
        self._tokenizer = prepare_tokenizer(tokenizer)
        self._vocabulary = check_padding(model, self._tokenizer)
        self._description = describe(model, state.config.key_site)
        self._in_words: Tensor | None = None
        self._suffix: Suffix | None = None
        self._beginnings = Beginnings(self._tokenizer)
        self._state = state
        self.hooks: HookSet = attach_hooks(
            model, list(state.config.layers), key_site=state.config.key_site
        )
        try:
            self._refresh()
        except BaseException:
            self.hooks.detach()
            raise

    @property
    def config(self) -> EditConfig:
        """The settings."""
        return self._state.config

    @property
    def batches(self) -> dict[int, BatchRecord]:
        """Batch number -> what was edited, in the order of editing."""
        return dict(self._state.batches)

    @property
    def alphas(self) -> dict[int, float]:
        """Layer index -> present threshold."""
        return {layer: self.hooks[layer].alpha for layer in self.config.layers}

    def edit(self, requests: Sequence[EditRequest], *, progress: str | None = None) -> EditResult:
        """Writes one batch of facts; whole, or, after any exception, not at all.

        With the default preset facts about one subject share a correction, and those of earlier
        batches are kept in it. Of two that ask the same prompt the later one holds.

        Targets v* are optimised with the hooks of earlier batches in place. Then for each layer in
        turn, with L layers and l of them done (equations of docs/algorithm.md):

            R = (v* - present output of the last edited block) / (L - l)
            C <- C + K K^T,  Delta <- Delta + R K^T C^-1
            alpha <- min(alpha, min over prompts of max over tokens of z)

        Args:
            requests: the k facts of the batch.
            progress: label of a progress bar of their targets on stderr, or None for no bar.

        Raises:
            RuntimeError: the editor was detached.
            TypeError: something else than a list of requests was given.
            ValueError: the batch is empty, a subject is not found in its prompt, a prompt does not
                fit the context window, or the model's outputs are not finite.
        """
        self.hooks.require_attached("edit")
        requests = check_requests(requests)
        encoded = self._encoded(requests)
        ties = self._ties(requests)
        # Targets need gradients, whatever mode the caller is in.
        with self._all_or_nothing(), torch.inference_mode(False):
            with fused_activations(self._model), planless_attention():
                return self._edit(requests, encoded, ties, progress)

    def revert(self, batch: int) -> None:
        """Takes a batch back, in any order, as if its keys and targets had never been there.

        Raises:
            ValueError: there is no such batch, or it cannot be taken back any more. After any
                exception nothing was changed.
        """
        with self._all_or_nothing():
            self._state.remove(batch)
            self._refresh()

    def save(self, path: str | os.PathLike[str], *, replace: bool = True) -> None:
        """Writes an EDITS folder, whole or not at all; an earlier one there is replaced.

        Raises:
            ValueError: the folder cannot be written, holds other files, or edits that something
                else wrote after this editor did, or, unless ``replace``, that it did not write.
        """
        save_state(path, self._state, self._model, replace=replace)

    @classmethod
    def load(cls, model: nn.Module, tokenizer: Any, path: str | os.PathLike[str]) -> Editor:
        """Opens an EDITS folder to go on editing.

        Raises:
            FormatError: not an EDITS folder, damaged, or of a newer version.
            FingerprintMismatchError: the edits belong to other weights.
            UnsupportedModelError: as for a new Editor.
        """
        check_whole("Editor.load", model)
        check_finite(model)
        state = load_state(path, expected=fingerprint(model), model=model)
        editor = cls.__new__(cls)
        editor._start(model, tokenizer, state)
        return editor

    def detach(self) -> None:
        """Takes the hooks off; the model answers as before, to the bit."""
        self.hooks.detach()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Brings hooks, memories and records back if the block fails."""
        hooks = {layer: self.hooks[layer].snapshot() for layer in self.config.layers}
        memories: dict[int, Any] = {
            i: edits.memory.snapshot() for i, edits in self._state.layers.items()
        }
        counters = {i: edits.next_group for i, edits in self._state.layers.items()}
        batches = dict(self._state.batches)
        try:
            yield
        except BaseException:
            for layer, edits in self._state.layers.items():
                edits.memory.restore(memories[layer])
                edits.next_group = counters[layer]
                self.hooks[layer].restore(hooks[layer])
            self._state.batches = batches
            raise

    def _refresh(self) -> None:
        for layer in self.config.layers:
            self._state.payload(layer).apply(self.hooks[layer], self.config)
        self.hooks.set_state("validated")

    def _ties(self, requests: list[EditRequest]) -> Ties:
        if self.config.scope != "membership" or self.config.correction != "own":
            return Ties(list(range(len(requests))), [], {})
        # A fact that was never written cannot be kept, and would only hold the others up.
        written = (
            request
            for batch in self._state.batches.values()
            for request, converged in zip(batch.requests, batch.converged, strict=True)
            if converged
        )
        return find_ties(requests, written)

    def _targets(
        self,
        requests: list[EditRequest],
        encoded: list[EncodedRequest],
        ties: Ties,
        reminders: list[EncodedRequest],
        pad_id: int,
        progress: str | None,
    ) -> tuple[Targets, dict[int, dict[Place, Earlier]]]:
        """Targets of the batch, and by request what earlier batches wrote where they go.

        Those of a replaced request are its replacement's, unused.
        """
        part = [i for i in range(len(encoded)) if i not in ties.replaced]
        every = self._reworded([encoded[i] for i in part] + reminders, pad_id)
        asked = [requests[i] for i in part] + ties.reminders
        earlier = self._earlier(asked, every, pad_id)
        alike: list[bool] = []
        if "subject_previous" in self.config.places:
            alike = self._beginnings.shared(every, asked, self._state.batches.values())

        def admit(pairs: list[tuple[int, Place]]) -> list[bool]:
            able = self._admitted([(every[i], place) for i, place in pairs])
            # Only at its subject's tokens is anything written of a reminder.
            mine = [i < len(part) or place[0] in SUBJECT_PLACES for i, place in pairs]
            own = [p[0] != "subject_previous" or p in earlier[i] or not alike[i] for i, p in pairs]
            return [all(each) for each in zip(able, mine, own, strict=True)]

        found = optimise_targets(
            self._model,
            self._description,
            every,
            self.config,
            pad_id=pad_id,
            ties=[ties.numbers[i] for i in part] + ties.numbers[len(encoded) :],
            earlier=earlier,
            admit=admit,
            continuing=self._continuing(),
            progress=progress,
            suffix=self._above(),
        )
        positions = {i: position for position, i in enumerate(part)}
        chosen = found.select(
            [positions[ties.replaced.get(i, i)] for i in range(len(encoded))],
            without=sorted(ties.replaced),
        )
        return chosen, dict(zip(part, earlier, strict=False))

    def _earlier(
        self, requests: Sequence[EditRequest], encoded: Sequence[EncodedRequest], pad_id: int
    ) -> list[dict[Place, Earlier]]:
        """What earlier batches wrote at the subjects' tokens, and where it is said now."""
        layer = self.config.layers[-1]
        names = [name for name in self.config.places if name in SUBJECT_PLACES]
        known = iter(
            self._state.corrections(layer, [(n, r.subject) for r in requests for n in names])
        )
        found: list[dict[Place, Earlier]] = []
        for request in encoded:
            found.append({})
            for name in names:
                if (value := next(known)) is None:
                    continue
                prompts = [*request.prompts, request.essence]
                there = [i for i, p in enumerate(prompts) if p.position((name, 0), ()) is not None]
                added = value.new_zeros(len(prompts), len(value))
                if there:  # a subject of several tokens elsewhere may be of one in all of these
                    x = self._inputs([prompts[i].at((name, 0), ()) for i in there], layer, pad_id)
                    added[there] = self._state.present(layer, x[:, -1], x.__getitem__)
                found[-1][name, 0] = Earlier(value, added)
        return found

    def _encoded(self, requests: Sequence[EditRequest]) -> list[EncodedRequest]:
        contexts, window = self.config.contexts, self._description.max_positions
        return encode_requests(self._tokenizer, requests, contexts, window, self._vocabulary)

    def _continuing(self) -> Tensor | None:
        """Ids that go on with a word, where targets must end theirs."""
        if not self.config.target_ends_word:
            return None
        if self._in_words is None:
            _, size = linear_shape(get_submodule(self._model, self._description.lm_head_path))
            device = next(self._model.parameters()).device
            self._in_words = word_continuing_tokens(self._tokenizer, size).to(device)
        return self._in_words

    def _above(self) -> Suffix:
        """The network above the edited layers, with what earlier batches have shown of it."""
        earlier = self._suffix
        self._suffix = Suffix(self._model, self._description, self.config.layers[-1])
        if earlier is not None:
            self._suffix.recall(earlier)
        return self._suffix

    def _reworded(self, encoded: list[EncodedRequest], pad_id: int) -> list[EncodedRequest]:
        """The same requests with the model's own wordings of them."""
        if not self.config.rewordings:
            return encoded
        with fused_activations(self._model, narrow=True):  # only text comes of it
            found = find_rewordings(
                self._model,
                [request.contexts[0] for request in encoded],
                # The subject alone, in the prompt, and in the prompt within a context.
                [[request.essence, *request.contexts[:2]] for request in encoded],
                most=self.config.rewordings,
                ends=end_tokens(self._model, self._tokenizer),
                pad_id=pad_id,
                max_positions=self._description.max_positions,
            )
        # A wording may be longer than the prompt, and the target follows it.
        window = self._description.max_positions or sys.maxsize
        return [
            replace(r, rewordings=[p for p in f if len(p.ids) + len(r.target) - 1 <= window])
            for r, f in zip(encoded, found, strict=True)
        ]

    def _edit(
        self,
        requests: list[EditRequest],
        encoded: list[EncodedRequest],
        ties: Ties,
        progress: str | None,
    ) -> EditResult:
        pad_id = self._tokenizer.pad_token_id
        with evaluating(self._model):
            reminders = self._encoded(ties.reminders)
            targets, earlier = self._targets(requests, encoded, ties, reminders, pad_id, progress)
            record = BatchRecord(
                requests, targets.values.cpu(), targets.converged, targets.losses, [], {}, {}
            )
            number = self._write(encoded, targets, earlier, record, pad_id)
            record.bounds.update(self._bounds(encoded, pad_id))
            self._refresh()
            held = answered(
                self._model,
                [(p.contexts[0].ids, p.target) for p in reminders],
            )
        # Two requests that replace one fact would say so twice.
        warnings = [
            *unwritten(record, ties),
            *contradictory(record, ties),
            *shut(record, self.alphas),
            *replaced(number, self._state.batches),
            *lost(ties, held),
        ]
        return EditResult(
            number,
            self.alphas,
            targets.values,
            targets.converged,
            targets.losses,
            targets.steps,
            list(dict.fromkeys(warnings)),
        )

    def _write(
        self,
        encoded: list[EncodedRequest],
        targets: Targets,
        earlier: Mapping[int, Mapping[Place, Earlier]],
        record: BatchRecord,
        pad_id: int,
    ) -> int:
        """Appends keys and targets to every layer's memory, the lowest layer first."""
        config = self.config
        each = config.key_pooling == "each"
        slots = [(r, targets.places[p]) for r, p in targets.used.nonzero().tolist()]
        own = len(slots)
        record.slots = [(r, tuple(config.places).index(place[0])) for r, place in slots]
        if each:
            about, read_at = record.owners(config.places), partial(self._inputs, pad_id=pad_id)
            slots += leaned_on(self._state, record.requests, encoded, earlier, about, read_at)
        record.slots += [(r, tuple(config.places).index(place[0])) for r, place in slots[own:]]
        record.endings = [self._endings(encoded[r], place) for r, place in slots]
        contexts = [
            prompt.at(place, encoded[request].target)
            for request, place in slots
            for prompt in encoded[request].contexts
        ]
        bare = contexts[:: len(config.contexts)]
        asked, count = (contexts, len(config.contexts)) if each else (bare, 1)
        goal = targets.values[:, targets.used[:, 0]].T
        read: States | None = None
        if each or targets.used[:, 1:].any():
            # The same delta in every context, on top of what the model says there.
            read = self._read(asked, config.layers[0], pad_id)
            start = read.outputs.to(goal.dtype)
            wanted = targets.deltas[targets.used][:, None].repeat(1, count, 1)
            for i, (r, place) in enumerate(slots[:own]):
                if place in earlier[r]:  # it takes the place of what is said there now
                    wanted[i] -= earlier[r][place].added[:count].to(wanted)
            nothing = wanted.new_zeros(len(slots) - own, *wanted.shape[1:])
            goal = start + torch.cat([wanted, nothing]).flatten(0, 1)
        if config.scope != "membership":
            # The published code lets every token take the hook while a batch is computed.
            self.hooks.set_state("temporary")
            read = None
        number = -1
        for position, layer in enumerate(config.layers):
            # What was read for the goals holds until something is written.
            states = self._read(asked, layer, pad_id) if read is None else read
            keys, outputs, read = states.keys, states.outputs, None
            if not each:
                keys = self._read_keys(contexts, layer, pad_id)
                keys = mean_keys(keys.view(len(slots), len(config.contexts), -1))
            left = len(config.layers) - position if config.sharing == "even" else 1
            share = (goal - outputs.to(goal.dtype)) / left
            if config.uses_cues:
                self._read_cues([(encoded[r], p) for r, p in slots], layer, pad_id, record)

            def inputs(rows: list[int], layer: int = layer) -> Tensor:
                return self._inputs([asked[row] for row in rows], layer, pad_id)

            # Without cues what an edit adds depends on the key alone.
            before = inputs if config.uses_cues else None
            number = self._state.append(layer, keys, share, record, before)
            hook = self.hooks[layer]
            self._state.payload(layer).apply(hook, config)
            hook.state = "validated"
        return number

    def _admitted(self, wanted: list[tuple[EncodedRequest, Place]]) -> list[bool]:
        """Which further places may be taken: those that leave other text alone.

        That is one with a cue; without cues a key of its own.
        """
        if self.config.uses_cues:
            return [bool(cue_distances(r.contexts, place)) for r, place in wanted]
        prompts = [request.contexts[0].at(place, request.target) for request, place in wanted]
        pad_id = self._tokenizer.pad_token_id
        lowest = self.config.layers[0]
        own = [self._endings(request, place) for request, place in wanted]
        keys = self._read_keys(prompts, lowest, pad_id)
        specific = self._state.specific(lowest, keys, own)
        # The same words about another subject end in nearly the same key.
        return [s and p[0] != "prompt_last" for s, (_, p) in zip(specific, wanted, strict=True)]

    def _read_cues(
        self,
        slots: list[tuple[EncodedRequest, Place]],
        layer: int,
        pad_id: int,
        record: BatchRecord,
    ) -> None:
        """Writes the cues of the slots' edits into the record."""
        edits = self._state.layers[layer]
        assert isinstance(edits.memory, EditMemory)
        cues = read_cues(
            slots,
            edits.memory,
            partial(self._inputs, layer=layer, pad_id=pad_id),
            sample=edits.sample,
            known=self._state.sample_tokens,
            decode=self._tokenizer.decode,
            key_site=self.config.key_site,
        )
        record.cues[layer], record.gaps[layer] = cues.filters.float().cpu(), cues.gaps
        record.reaches = cues.reaches

    def _inputs(self, prompts: list[EncodedPrompt], layer: int, pad_id: int) -> Tensor:
        """What a layer reads up to the token looked up, ``[R, T, n]``, zeros at the left."""
        return read_up_to(self._model, self._description, prompts, layer, pad_id=pad_id)

    def _endings(self, request: EncodedRequest, place: Place) -> list[Ending]:
        known = self._state.sample_tokens
        if known is None:
            return []
        return endings((p.at(place, request.target) for p in request.contexts), known.width)

    def _read(self, prompts: list[EncodedPrompt], layer: int, pad_id: int) -> States:
        """Keys of a layer and outputs of the last edited block."""
        return self._states(prompts, layer, self.config.layers[-1], pad_id)

    def _read_keys(self, prompts: list[EncodedPrompt], layer: int, pad_id: int) -> Tensor:
        """Keys alone, for which nothing above them is run."""
        return self._states(prompts, layer, None, pad_id).keys

    def _states(
        self, prompts: list[EncodedPrompt], layer: int, last: int | None, pad_id: int
    ) -> States:
        return read_states(
            self._model,
            self._description,
            prompts,
            layer,
            last,
            pad_id=pad_id,
            together=self.config.counts_padding,
        )

    def _bounds(self, encoded: list[EncodedRequest], pad_id: int) -> dict[int, float]:
        """Per layer the smallest over the prompts of the largest score.

        In the unedited model, as in the published code; the membership scope's keys were read in
        the edited one, and are judged there.
        """
        bare = [request.contexts[0] for request in encoded]
        edited = self.config.scope == "membership"
        with nullcontext() if edited else self.hooks.disabled():
            inputs, mask = read_inputs(
                self._model, self._description, bare, self.config.layers, pad_id=pad_id
            )
        bounds = {}
        for layer, x in inputs.items():
            hook = self.hooks[layer]
            z = whole_scores(hook, x, None if self.config.counts_padding else mask.to(x.device))
            largest = z.nan_to_num(nan=-float("inf")).amax(dim=-1)
            defined = largest[largest > -float("inf")]
            bounds[layer] = float(defined.min()) if len(defined) else float("nan")
        return bounds
