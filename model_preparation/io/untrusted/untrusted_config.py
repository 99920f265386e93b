"""Makes transformers' configs from a stranger's config.json or generation_config.json.

Sizes that no model has are refused before anything is made. Some fields do more than describe the model: they fetch
code by name, or replace a method. Such fields are left out.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import GenerationConfig, PreTrainedConfig

from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.untrusted_files import check_sizes

# Fields that name code to fetch (a model's, or an attention kernel's), or other files to read.
_NOT_DESCRIPTIONS = {"auto_map", "attn_implementation", "experts_implementation", "configuration_files"}


def config_from(fields: dict[str, Any], kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The config of class `kind` that `fields` describe.

    Raises:
        ValueError: if no config can be made of them. The message says why.
    """
    check_sizes(fields)
    try:
        config = kind.from_dict(_plain(fields, kind))
    except Exception as error:  # transformers' validators raise errors of every kind
        raise ValueError(_one_line(error)) from error
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise ValueError(f"dtype is {config.dtype!r:.80}, which torch does not have")
    return config


def generation_config_from(fields: dict[str, Any]) -> GenerationConfig:
    """The generation config that `fields` describe; raises ValueError as `config_from` does."""
    check_sizes(fields)
    try:
        return GenerationConfig(**_plain(fields, GenerationConfig))
    except Exception as error:  # transformers' validators raise errors of every kind
        raise ValueError(_one_line(error)) from error


@contextlib.contextmanager
def refusing_impossible_models() -> Iterator[None]:
    """For code that makes a model, or parts of one, from a config: errors become SurgeryErrors."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # a division by zero, an unknown activation, a size too large for torch, ...
        raise SurgeryError(
            f"No model can be made from this config ({type(error).__name__}: {_one_line(error)}). "
            "Download the model again."
        ) from error


def _plain(fields: dict[str, Any], kind: type) -> dict[str, Any]:
    """The fields that only describe the model."""
    return {
        name: value
        for name, value in fields.items()
        if not name.startswith("_") and name not in _NOT_DESCRIPTIONS and not callable(getattr(kind, name, None))
    }


def _one_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassClassValidationError) and error.__cause__:
        error = error.__cause__  # its text is the same, without the validator's name
    return one_line(error)
