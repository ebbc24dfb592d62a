"""Loading a causal language model and its tokenizer with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from coachhook.errors import FormatError

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[nn.Module, Any]:
    """Load a causal language model for inference, and its tokenizer.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a name on the Hugging Face hub.
        device: where the weights go; ``None`` leaves them on the CPU.
        dtype: a torch dtype or its name; ``None`` takes the one the checkpoint's config names.

    Returns:
        ``(model, tokenizer)``: the model in evaluation mode, the tokenizer with a pad token.

    Raises:
        FormatError: a weights file is truncated or damaged.
        FileNotFoundError: there is no such folder, it holds no tokenizer, or transformers finds no
            model under that name.
        ValueError: unknown dtype, a device torch does not see, or a tokenizer without pad and
            end-of-text token.
    """
    from transformers import AutoModelForCausalLM

    name = _checked_name(name_or_path)
    wanted = _checked_dtype(dtype)
    where = None if device is None else usable_device(device, "load_model: device")
    try:
        tokenizer = _load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, **{_dtype_keyword(): wanted})
    except SafetensorError as error:
        raise FormatError(
            f"load_model: the weights of {name!r} must be whole safetensors files, got: {error}; "
            "copy or download the model again"
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            "load_model: name_or_path must be a folder or hub name that transformers can load, "
            f"got {name!r}: {error}"
        ) from error
    if where is not None:
        model = model.to(where)
    return model.eval(), prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer a pad token (its end-of-text token) where it has none, and return it.

    Raises:
        ValueError: it has no end-of-text token either, or ends every text with a token of its own.
    """
    whole, bare = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
    if bare and whole[-len(bare) :] != bare:
        # A prompt would end there, before its answer.
        raise ValueError(
            "prepare_tokenizer: tokenizer must put no token after a text, got "
            f"{tokenizer.convert_ids_to_tokens(whole[-1])!r} after every text; make it with "
            "add_eos_token=False"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "prepare_tokenizer: tokenizer must have a pad token or an end-of-text token, "
                f"got {type(tokenizer).__name__} with neither; set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_padding(model: Any, tokenizer: Any) -> int:
    """Checks that the model knows the pad token; the size of its vocabulary.

    Raises:
        ValueError: it does not.
    """
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= vocabulary:
        raise ValueError(
            "check_padding: tokenizer.pad_token must be one of the model's "
            f"{vocabulary} tokens, got {tokenizer.pad_token!r} with id {tokenizer.pad_token_id}; "
            "set another pad_token, or call model.resize_token_embeddings before anything else"
        )
    return vocabulary


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids after which a text of the model has ended."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _checked_name(name_or_path: str | Path) -> str:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"load_model: name_or_path must be a folder with config.json, got {path}"
            )
        return str(path)
    if path.is_file():
        raise FileNotFoundError(
            f"load_model: name_or_path must be a folder with config.json, got the file {path}"
        )
    name = str(name_or_path)
    # A hub name is "name" or "organisation/name"; everything else was meant as a folder.
    if isinstance(name_or_path, Path) or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"load_model: name_or_path must exist, got the folder {name!r}")
    return name


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    wanted = (
        "load_model: name_or_path must hold a tokenizer (tokenizer.json or the like) that "
        f"transformers can load, got {name!r}"
    )
    remedy = "save it there with tokenizer.save_pretrained"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, ImportError) as error:  # before 5.0 what might read other files is missed
        raise FileNotFoundError(f"{wanted}: {error}; {remedy}") from error
    # Where the files are missing, some classes come without a vocabulary instead of an error.
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise FileNotFoundError(f"{wanted} without its vocabulary; {remedy}")
    return tokenizer


def _checked_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise ValueError(f"load_model: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return resolved


def usable_device(device: str | torch.device, argument: str) -> torch.device:
    """The device, where this build of torch can compute on it.

    Args:
        device: a torch device or its name.
        argument: what the message calls it.

    Raises:
        ValueError: torch knows no such name, or has no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{argument} must be a torch device such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    if found.type == "cuda":
        # Asked without a tensor: of several processes, each would open a context on this device.
        if (found.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{argument} must be one torch sees, got {str(device)!r} and "
                f"{torch.cuda.device_count()} CUDA devices; `coachhook doctor` says why"
            )
        return found
    try:
        # Read back, because "meta" holds tensors without values.
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend fails in its way
        raise ValueError(
            f"{argument} must be one torch sees, got {str(device)!r}, which torch "
            f"{torch.__version__} cannot use here; name another or install a torch built for it"
        ) from error
    return found


def _dtype_keyword() -> str:
    from packaging.version import Version
    from transformers import __version__

    return "dtype" if Version(__version__) >= Version("4.56") else "torch_dtype"
