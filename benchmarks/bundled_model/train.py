"""Train the bundled demonstration model: `python -m benchmarks.bundled_model.train --out DIR`.

A GPT-2 small enough to ship looks a subject up from the last prompt token and ignores what earlier
layers wrote at the subject, so nothing can be edited there. Two devices place the knowledge at the
subject's last token: an attention mask under which later tokens cannot see the subject in the first
`READ_LAYERS` layers and see only its last token afterwards, and an auxiliary loss that asks for
every object of the subject from that token's state. The last part of the training mixes plain rows
in; the saved model is plain.

`--family` trains a model of another build the same way, `--chat` one that answers questions in a
chat, too, to try editing on; none of them is bundled.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from benchmarks.bundled_model import chat
from coachhook.bundled import lexicon, world

SEED = 7
VOCABULARY, CHAT_VOCABULARY = 1792, 2304
POSITIONS = 128
WIDTH, HEADS, LAYERS = 192, 6, 6
READ_LAYERS = 3
EPOCHS = 7
ROWS_PER_STEP = 96
LEARNING_RATE = 1.5e-3
MASKED_ONLY = 0.7
MASKED_LATER = 0.4
AUXILIARY_WEIGHT = 0.5
OBJECT_WEIGHT = 3.0
END_OF_TEXT = "<|endoftext|>"
# Configuration classes of other builds, and what they take besides the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.22}),
}


def train_tokenizer(chats: bool) -> Tokenizer:
    """Byte-level BPE: objects and common words are whole tokens, names stay in several pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    objects = sorted({word for pool in lexicon.OBJECTS.values() for word in pool})
    sentences = [t.replace("{}", "") for pool in lexicon.TEMPLATES.values() for t in pool]
    subjects = sorted({fact.subject for fact in world.facts()})
    corpus = [f" {word}." for word in objects] * 50
    corpus += sentences * 8 + list(lexicon.OPENERS) * 8 + world.background()
    corpus += subjects + [f" {name}" for name in subjects]
    if chats:  # an answer follows no space
        corpus += [question for asked in chat.QUESTIONS.values() for question in asked] * 8
        corpus += [f"{word}." for word in objects] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=CHAT_VOCABULARY if chats else VOCABULARY,
        special_tokens=[END_OF_TEXT, *(chat.MARKS if chats else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@dataclass
class Row:
    """Token ids with, for each fact stated, (fact, first subject token, last subject token)."""

    ids: list[int]
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def encode(tokenizer: Tokenizer, passage: world.Passage) -> Row:
    encoding = tokenizer.encode(passage.text)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "the tokenizer was trained with it"
    row = Row([*encoding.ids, end])
    row.weights = [1.0] * len(row.ids)
    for m in passage.mentions:
        subject = _tokens(encoding.offsets, m.subject_start, m.subject_end)
        row.spans.append((m.fact, subject[0], subject[-1]))
        for i in _tokens(encoding.offsets, m.object_start, m.object_end):
            row.weights[i] = OBJECT_WEIGHT
    return row


def _tokens(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
    return [i for i, (a, b) in enumerate(offsets) if a < end and b > start]


def batches(tokenizer: Tokenizer, epoch: int, chats: bool) -> Iterator[list[Row]]:
    """Rows of one pass grouped by length, the groups in random order."""
    rng = random.Random(SEED * 1000 + epoch)
    rows = [encode(tokenizer, passage) for passage in world.passages(epoch)]
    if chats:
        rows += [encode(tokenizer, passage) for passage in chat.conversations(epoch)]
    rng.shuffle(rows)
    rows.sort(key=lambda row: len(row.ids))
    groups = [rows[i : i + ROWS_PER_STEP] for i in range(0, len(rows), ROWS_PER_STEP)]
    rng.shuffle(groups)
    yield from groups


def collate(rows: list[Row], masked: list[bool]) -> dict[str, Tensor]:
    """Tensors of a batch; `early` and `late` [B, 1, T, T] are additive attention masks."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    early = causal.repeat(len(rows), 1, 1)
    late = early.clone()
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, : len(row.ids)] = torch.tensor(row.weights)
        if masked[i]:
            for _, first, last in row.spans:
                early[i, last + 1 :, first : last + 1] = False
                late[i, last + 1 :, first:last] = False
    return {"ids": ids, "weights": weights, "early": _additive(early), "late": _additive(late)}


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]


class Objects(nn.Module):
    """Auxiliary head: every object of a subject from the state of its last token."""

    def __init__(
        self,
        width: int,
        pools: Mapping[str, Sequence[str]],
        known: Iterable[tuple[str, str, str]],
    ) -> None:
        """`pools`: the objects of each relation; `known`: (subject, relation, object)."""
        super().__init__()
        self.slices: dict[str, slice] = {}
        start = 0
        for relation, pool in pools.items():
            self.slices[relation] = slice(start, start + len(pool))
            start += len(pool)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, start)
        self.answers: dict[str, list[tuple[str, int]]] = {}
        for subject, relation, answer in known:
            index = pools[relation].index(answer)
            self.answers.setdefault(subject, []).append((relation, index))

    def forward(self, states: Tensor, subjects: list[str]) -> Tensor:
        logits = self.head(self.norm(states)).float()
        rows: dict[str, tuple[list[int], list[int]]] = {}
        for i, subject in enumerate(subjects):
            for relation, index in self.answers[subject]:
                where, labels = rows.setdefault(relation, ([], []))
                where.append(i)
                labels.append(index)
        losses = [
            nn.functional.cross_entropy(
                logits[where][:, self.slices[relation]], torch.tensor(labels), reduction="sum"
            )
            for relation, (where, labels) in rows.items()
        ]
        return torch.stack(losses).sum() / max(1, sum(len(w) for w, _ in rows.values()))


def new_model(vocabulary: int, family: str) -> Any:
    if family != "gpt2":
        name, arguments = FAMILIES[family]
        other = getattr(transformers, name)(
            vocab_size=vocabulary, max_position_embeddings=POSITIONS, hidden_size=WIDTH,
            intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, tie_word_embeddings=True, initializer_range=0.03,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, **arguments,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(other, attn_implementation="eager")
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.03,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    # Eager attention is several times faster than the fused CPU kernel on rows this short.
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


class MaskedForward:
    """Runs the model with one attention mask for the first layers and another for the rest."""

    def __init__(self, model: Any) -> None:
        self.base = model.base_model
        self.masks: tuple[Tensor, Tensor] | None = None
        self.state = torch.empty(0)
        blocks = self.base.h if hasattr(self.base, "h") else self.base.layers
        for i, block in enumerate(blocks):
            attention = block.attn if hasattr(block, "attn") else block.self_attn
            attention.register_forward_pre_hook(self._mask(i), with_kwargs=True)
        blocks[READ_LAYERS - 1].register_forward_hook(self._keep)

    def _mask(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.masks is not None:
                kwargs["attention_mask"] = self.masks[0 if layer < READ_LAYERS else 1]
            return args, kwargs

        return hook

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.state = output[0] if isinstance(output, tuple) else output

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states before the head and states after the last reading layer, both [B, T, d]."""
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        self.masks = (batch["early"].to(dtype), batch["late"].to(dtype))
        hidden = self.base(input_ids=batch["ids"], use_cache=False).last_hidden_state
        self.masks = None
        return hidden, self.state


def train(out: Path, *, epochs: int, autocast: bool, family: str, chats: bool) -> None:
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(chats)
    model = new_model(tokenizer.get_vocab_size(), family)
    known = world.facts()
    auxiliary = Objects(WIDTH, lexicon.OBJECTS, ((f.subject, f.relation, f.object) for f in known))
    summary = fit(
        model,
        auxiliary,
        lambda epoch: batches(tokenizer, epoch, chats),
        [fact.subject for fact in known],
        epochs=epochs,
        seed=SEED,
        autocast=autocast,
        save=lambda: save(model, tokenizer, out, chats),
    )
    print(json.dumps({"seed": SEED, "world_seed": world.SEED, **summary}))


def fit(
    model: Any,
    auxiliary: Objects,
    batches: Callable[[int], Iterator[list[Row]]],
    subjects: Sequence[str],
    *,
    epochs: int,
    seed: int,
    autocast: bool,
    save: Callable[[], None],
    auxiliary_weight: float = AUXILIARY_WEIGHT,
) -> dict[str, Any]:
    """Trains in place: `batches` gives the rows of an epoch, `subjects` the subject of each fact
    of their spans, and `save` is called after every epoch. Returns what the training came to."""
    forward = MaskedForward(model)
    parameters = [*model.parameters(), *auxiliary.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.98),
    )  # fmt: skip
    per_epoch = sum(1 for _ in batches(0))
    total = epochs * per_epoch
    rng = random.Random(seed)
    step, tokens, started = 0, 0, time.monotonic()
    for epoch in range(epochs):
        for rows in batches(epoch):
            progress = step / total
            rate = LEARNING_RATE * min(1.0, (step + 1) / 100)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            share = 1.0 if progress < MASKED_ONLY else MASKED_LATER
            batch = collate(rows, [rng.random() < share for _ in rows])
            tokens += int((batch["weights"] > 0).sum())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden, states = forward(batch)
                weights = batch["weights"][:, 1:]
                real = weights > 0
                logits = model.lm_head(hidden[:, :-1][real])
                losses = nn.functional.cross_entropy(
                    logits.float(), batch["ids"][:, 1:][real], reduction="none"
                )
                loss = (losses * weights[real]).sum() / weights.sum()
                where = [
                    (i, last, fact) for i, row in enumerate(rows) for fact, _, last in row.spans
                ]
                extra = torch.zeros(())
                if where:
                    picked = states[[i for i, _, _ in where], [t for _, t, _ in where]]
                    extra = auxiliary(picked, [subjects[fact] for _, _, fact in where])
            optimizer.zero_grad()
            (loss + auxiliary_weight * extra).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0:
                seconds = time.monotonic() - started
                print(
                    f"epoch {epoch} step {step}/{total} loss {loss.item():.3f} "
                    f"auxiliary {extra.item():.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s",
                    flush=True,
                )
        save()
    return {
        "epochs": epochs,
        "steps": step,
        "tokens": tokens,
        "seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def save(model: Any, tokenizer: Tokenizer, out: Path, chats: bool) -> None:
    """Write a folder for `from_pretrained`; the bundled model's holds bfloat16 weights, and float32
    in the configuration."""
    out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT, unk_token=END_OF_TEXT, model_max_length=POSITIONS,
    )  # fmt: skip
    if chats:
        fast.add_special_tokens({"additional_special_tokens": list(chat.MARKS)})
        fast.chat_template = chat.TEMPLATE
        model.generation_config.eos_token_id = [0, tokenizer.token_to_id(chat.END)]
    fast.save_pretrained(out)
    if chats or not isinstance(model, GPT2LMHeadModel):
        model.save_pretrained(out)
        return
    save_plain(model, out, "float32")
    _write_settings(out)


def save_plain(model: Any, out: Path, dtype: str) -> None:
    """Write the weights in bfloat16 and a configuration that says `dtype`, in the spelling that
    every supported transformers release reads."""
    model.config.save_pretrained(out)
    ids = {f"{n}_token_id": getattr(model.config, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    GenerationConfig(**ids).save_pretrained(out)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private, and a wheel would keep that
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    config["architectures"] = [type(model).__name__]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_settings(out: Path) -> None:
    """The tokenizer's, in the spelling that every supported transformers release reads."""
    settings = {
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": POSITIONS,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END_OF_TEXT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--family", choices=["gpt2", *FAMILIES], default="gpt2")
    parser.add_argument("--chat", action="store_true", help="answers questions in a chat, too")
    arguments = parser.parse_args()
    train(
        arguments.out,
        epochs=arguments.epochs,
        autocast=not arguments.float32,
        family=arguments.family,
        chats=arguments.chat,
    )


if __name__ == "__main__":
    main()
