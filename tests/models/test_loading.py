"""Loading, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from coachhook.models import check_finite, describe, load_model, prepare_tokenizer

from .families import tiny


def _tokenizer(**special: str):
    words = {"<e>": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<e>")), **special
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama").to(torch.bfloat16).save_pretrained(path)
    _tokenizer(eos_token="<e>").save_pretrained(path)
    return path


def test_a_folder_is_loaded_for_inference(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.pad_token is not None
    model, _ = load_model(str(folder), dtype="float64", device="cpu")
    assert model.dtype == torch.float64
    assert describe(model).family == "llama"


@pytest.mark.parametrize("name", ["factlm-gpt2", "factlm-llama"])
def test_the_small_fact_models(shared_dir: Path, name: str) -> None:
    model, _ = load_model(shared_dir / "models" / name, dtype=torch.float32)
    description = describe(model)
    assert description.num_layers == 6
    assert description.default_layers() == [0, 1, 2]
    check_finite(model)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must exist, got the folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"with config\.json"):
        load_model(tmp_path)


def test_a_damaged_folder_is_named(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_model(tmp_path)


def test_bad_settings_are_refused_before_loading(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float64"):
        load_model(folder, dtype="float31")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device must be a torch device"):
        load_model(folder, device="nonsense")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_model(tmp_path)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")  # of which transformers makes an empty one
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "gpt2")):
        load_model(tmp_path / "gpt2")


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"device must be one torch sees, got '{missing}'"):
        load_model(folder, device=missing)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="got 'cuda' and 0 CUDA devices"):
            load_model(folder, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="load_model: device must be one torch sees, got 'meta'"):
        load_model(folder, device="meta")


def test_the_pad_token_is_the_end_of_text_token() -> None:
    tokenizer = _tokenizer(eos_token="<e>")
    assert prepare_tokenizer(tokenizer) is tokenizer
    assert tokenizer.pad_token_id == 0
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        prepare_tokenizer(_tokenizer())


def test_a_tokenizer_that_ends_every_text_is_refused() -> None:
    """A prompt would be answered after its end."""
    tokenizer = _tokenizer(eos_token="<e>")
    after = processors.TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = after("<e> $A", special_tokens=[("<e>", 0)])
    assert prepare_tokenizer(tokenizer)("a")["input_ids"] == [0, 1]
    tokenizer.backend_tokenizer.post_processor = after("$A <e>", special_tokens=[("<e>", 0)])
    with pytest.raises(ValueError, match="no token after a text, got '<e>' after every text; make"):
        prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny("gpt2")
    check_finite(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = value
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight"):
        check_finite(model)
