"""The two networks of SERAC and their training: scope classifier and counterfactual model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.texts import TargetBatch, log_probs_at, target_batch
from coachhook.evaluation.baselines.training_facts import TrainingFacts
from coachhook.evaluation.scoring import Row, encode_pairs
from coachhook.models import ModelDescription, get_submodule

_ROWS_AT_ONCE = 64


class ScopeClassifier(nn.Module):
    """Embeds a text at each of its tokens; near embeddings are of one scope.

    It reads two states of the base model, both normalised: that of a middle block, pooled over the
    tokens so far by a few learned attentions, and that of the last block at the token itself.

        pool_h   = sum_{s<=t} softmax_s(a_h^T middle_s) middle_s
        f(x_<=t) = W concat(pool_1, .., pool_H, last_t)
        g(z, x)  = exp(-||f(z) - f(x)||^2)

    Args:
        size: width of the states.
        heads: attentions.
        width: of the embedding.
    """

    def __init__(self, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(size, heads)
        self.out = nn.Linear(size * (heads + 1), width)
        self._scale = width**-0.5

    def forward(self, middle: Tensor, last: Tensor, mask: Tensor) -> Tensor:
        """Embeddings ``[B, Q, e]`` of the last Q tokens.

        Args:
            middle: states of the middle block ``[B, T, d]``.
            last: states of the last block ``[B, Q, d]``.
            mask: bool ``[B, T]``, True = real token.
        """
        middle, last = (F.layer_norm(x, x.shape[-1:]) for x in (middle, last))
        tokens, asked = middle.shape[1], last.shape[1]
        places = torch.arange(tokens, device=middle.device)
        seen = places <= places[tokens - asked :, None]  # [Q, T]
        logits = self.attention(middle).transpose(1, 2)[:, :, None]  # [B, H, 1, T]
        # A large finite number, so that a row of padding alone gives no NaN.
        logits = logits.masked_fill(~(seen & mask[:, None, None]), torch.finfo(last.dtype).min)
        pooled = torch.einsum("bhqt,btd->bqhd", logits.softmax(-1), middle).flatten(2)
        embedded: Tensor = self.out(torch.cat((pooled, last), dim=-1))
        return embedded * self._scale


def scope_loss(entries: Tensor, queries: Tensor, owner: Tensor) -> Tensor:
    """Balanced binary cross-entropy of ``g`` over all pairs of entry and query.

    Args:
        entries: embeddings of edits ``[N, e]``.
        queries: embeddings of other texts ``[Q, e]``.
        owner: number of the entry whose scope a query is in ``[Q]``, -1 for none.

    Returns:
        The mean of ``-log g`` over the pairs in scope plus the mean over queries of the sum over
        entries of ``-log(1 - g)`` of those out of scope.
    """
    distance = (entries - queries[:, None]).square().sum(-1)
    positive = owner[:, None] == torch.arange(len(entries), device=owner.device)
    outside = -torch.log(-torch.expm1(-distance.clamp(min=1e-6)))
    return distance[positive].mean() + outside.masked_fill(positive, 0).sum(1).mean()


class BlockStates:
    """Reads the outputs of two blocks during forwards of a model.

    Attributes:
        middle: of the middle block in the last forward, ``[B, T, d]``.
        last: of the last block.
    """

    def __init__(self, model: nn.Module, description: ModelDescription) -> None:
        self.middle = self.last = torch.zeros(0)
        middle = max(description.num_layers // 2 - 1, 0)
        self._handles = []
        for name, index in (("middle", middle), ("last", description.num_layers - 1)):
            block = get_submodule(model, description.layers[index].block_path)
            self._handles.append(block.register_forward_hook(self._keep(name)))

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states = (output if isinstance(output, Tensor) else output[0]).detach()
            setattr(self, name, states if states.dtype == torch.float64 else states.float())

        return hook

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def train_classifier(
    model: Any,
    states: BlockStates,
    facts: TrainingFacts,
    classifier: ScopeClassifier,
    *,
    pad_id: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """Trains the classifier on the facts; returns its loss at every step.

    In scope of an edit are the ends of its own prompt and of its paraphrases; out of scope are the
    ends of neighbouring prompts, the ends of the other facts' texts, a token within its own prompt
    and the end of its prompt with the answer.
    """
    device = next(classifier.parameters()).device
    rows = [*facts.edits]
    starts = []
    for same_scope, other_scope in zip(facts.paraphrases, facts.neighbors, strict=True):
        starts.append((len(rows), len(same_scope), len(other_scope)))
        rows += [*same_scope, *other_scope]
    ends = [len(row.ids) - row.target - 1 for row in rows]
    held = _read(model, states, rows, pad_id, device)
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    optimiser = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=1e-2)
    losses = []
    bar = tqdm(range(steps), desc="serac: scope classifier", disable=not progress)
    for _ in bar:
        asked: list[tuple[int, int]] = []  # row, place
        owner = []
        chosen = facts.draw(batch, generator)
        entry = {rows[i].ids[: ends[i] + 1]: number for number, i in enumerate(chosen)}
        for number, i in enumerate(chosen):
            start, paraphrases, neighbors = starts[i]
            same = start + pick(paraphrases)
            other = start + paraphrases + pick(neighbors)
            asked += [(same, ends[same]), (other, ends[other])]
            asked += [(i, pick(ends[i] + 1)), (i, len(rows[i].ids) - 1)]
            # A text may be the prompt of an edit by chance: then it is in that edit's scope.
            owner.append(number)
            owner += [entry.get(rows[r].ids[: at + 1], -1) for r, at in asked[-3:]]
        texts = [(i, ends[i]) for i in chosen] + asked
        embedded = _embed(classifier, [held[i] for i, _ in texts], [at for _, at in texts])
        loss = scope_loss(
            embedded[: len(chosen)],
            embedded[len(chosen) :],
            torch.tensor(owner, device=device),
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def _read(
    model: Any, states: BlockStates, rows: Sequence[Row], pad_id: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """States ``[T, d]`` of the two blocks for each text."""
    held = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows[start : start + _ROWS_AT_ONCE]
        texts = target_batch(chunk, pad_id, device)
        model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False)
        for i, row in enumerate(chunk):
            n = len(row.ids)
            held.append((states.middle[i, :n].to(device), states.last[i, :n].to(device)))
    return held


def _embed(
    classifier: ScopeClassifier, held: Sequence[tuple[Tensor, Tensor]], places: Sequence[int]
) -> Tensor:
    """Embeddings ``[R, e]`` of texts up to one place each."""
    lengths = [at + 1 for at in places]
    middle = nn.utils.rnn.pad_sequence(
        [m[:n] for (m, _), n in zip(held, lengths, strict=True)], batch_first=True
    )
    last = torch.stack([x[at] for (_, x), at in zip(held, places, strict=True)])
    mask = (
        torch.arange(middle.shape[1], device=middle.device)
        < torch.tensor(lengths, device=middle.device)[:, None]
    )
    # Asked at the end of the padded text, an embedding sees every real token before it.
    embedded: Tensor = classifier(middle, last[:, None], mask)
    return embedded[:, 0]


def counterfactual_copy(model: Any, description: ModelDescription, blocks: int | None) -> Any:
    """A trainable copy of a model, of its first ``blocks`` blocks; float32 or float64.

    It is in evaluation mode, in training too: with the model's own mode its dropout, and so what is
    learned, would depend on how the caller left the model.
    """
    network = copy.deepcopy(model)
    if blocks is not None and blocks < description.num_layers:
        layers: Any = get_submodule(network, description.blocks_path)
        del layers[blocks:]
        config = network.config.get_text_config()
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    if next(network.parameters()).dtype != torch.float64:
        network = network.float()
    return network.requires_grad_(True).eval()


def in_context_row(memory: Row, separator: int, text: Row) -> Row:
    """An edit, and the text that is asked: target, separator, prompt, separator, text.

    With the target in front, at places that are always the same, a small network that has never
    copied from its context learns to in a few hundred steps.
    """
    prompt, target = memory.ids[: -memory.target], memory.ids[-memory.target :]
    return Row((*target, separator, *prompt, separator, *text.ids), text.target)


def train_counterfactual(
    network: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    separator: int,
    max_positions: int | None,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """Trains the copy to answer from the edit before the question; its loss at every step.

    Minimises ``-log p(y | edit, x)`` with x the prompt of a fact or one of its paraphrases.
    Half of the time y is the fact's own target, else that of another fact or any word that is one
    token, so that it has to be read and cannot be learned by heart. Texts that do not fit the
    context window together are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = sorted({t for r in requests for t in (r.target_new, r.target_true) if t})
    words = _words(tokenizer) or targets
    device = network.get_input_embeddings().weight.device

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="serac: counterfactual model", disable=not progress)
    for step in bar:
        pairs = []
        for _ in range(batch):
            request = requests[pick(len(requests))]
            pool = ([request.target_new], [request.target_new], targets, words)[pick(4)]
            target = pool[pick(len(pool))]
            asked = (request.text, *request.paraphrases)
            pairs += [(request.text, target), (asked[pick(len(asked))], target)]
        encoded = encode_pairs(tokenizer, pairs)
        rows = [
            in_context_row(memory, separator, text)
            for memory, text in zip(encoded[::2], encoded[1::2], strict=True)
        ]
        rows = [r for r in rows if max_positions is None or len(r.ids) <= max_positions]
        if not rows:
            raise ValueError(
                "serac: a prompt of train_requests must fit the context window of "
                f"{max_positions} tokens twice, got none that does"
            )
        texts = target_batch(rows, tokenizer.pad_token_id, device)
        nll, _ = texts.losses(_log_probs(network, texts))
        loss = nll.mean()
        for group in optimiser.param_groups:  # falls to 0 with the last step
            group["lr"] = lr * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token after a space; none where decoding drops the space."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [text[1:] for text in texts if text.startswith(" ") and text[1:].isalpha()]


def _log_probs(network: Any, texts: TargetBatch) -> Tensor:
    logits = network(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False).logits
    return log_probs_at(logits, texts.row, texts.column)
