"""A model's name to a folder on this machine: a folder is itself, an id comes from the Hub.

Knows which files of a repository are read; reads none of them. No torch.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from model.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_SMALL_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "*.safetensors.index.json",
    "quantization.json",  # of a quantised copy (`quantized_copy`)
)

_QUANTIZED = ("experts-*.safetensors", "attention-*.safetensors")
"""What a quantised copy holds beside its dense tensors; others have no such files."""

_WEIGHTS = ("model*.safetensors", "consolidated*.safetensors", "consolidated*.pt")
"""The forms in which a repository may hold its weights; the first that is there is taken."""


def is_hub_id(model: str | Path) -> bool:
    """Whether it has the form of an id on the Hub, which a relative path may have as well."""
    return _HUB_ID.fullmatch(str(model)) is not None


def is_small_file(name: str) -> bool:
    """Whether a file of a checkpoint, by its name within the folder, is read whole by everybody."""
    return _is_one_of(name, _SMALL_FILES)


def is_weight_file(name: str) -> bool:
    """Whether a file of a checkpoint, by its name within the folder, holds tensors."""
    return _is_one_of(name, (*_QUANTIZED, *_WEIGHTS))


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    is_plain = "/" not in name and name not in ("", ".", "..")
    return name in patterns or (is_plain and any(fnmatchcase(name, each) for each in patterns))


def resolve(model: str | Path) -> Path:
    """The folder of a model: itself if there is one, else "organisation/name" from the Hub.

    What is in huggingface_hub's cache is not fetched again; the library shows the progress of the
    rest, and its variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) hold.
    Raises CheckpointError saying what was tried and what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    hub_id = str(model)
    if not is_hub_id(hub_id):
        raise CheckpointError(
            f"model {hub_id!r} is neither a folder nor a Hugging Face Hub id (organisation/name)"
        )
    for weights in _WEIGHTS:
        folder = _download(hub_id, [*_SMALL_FILES, *_QUANTIZED, weights])
        if any(folder.glob(weights)):
            return folder
    raise CheckpointError(
        f"model {hub_id} on the Hugging Face Hub, or as far as it is in the cache {folder}, holds "
        f"no weights that can be read ({', '.join(_WEIGHTS)})"
    )


def _download(hub_id: str, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"model {hub_id} is no folder, and to fetch it from the Hugging Face Hub the package "
            f"huggingface_hub is needed: {error}"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        reason = "its makers ask you to accept their terms on its page and to set HF_TOKEN"
        raise _failed(hub_id, reason, error) from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such model, or it is private and HF_TOKEN does not open it"
        raise _failed(hub_id, reason, error) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = (
            "the Hub cannot be reached (or HF_HUB_OFFLINE forbids it) and the model is not in the "
            "cache; fetch it where there is a network, or give the path of a folder"
        )
        raise _failed(hub_id, reason, error) from error
    except Exception as error:  # the library's own errors, its HTTP client's, the disk's: no base
        reason = "the download failed; what has arrived is kept, so try again or give a folder"
        raise _failed(hub_id, reason, error) from error


def _failed(hub_id: str, reason: str, error: Exception) -> CheckpointError:
    detail = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"model {hub_id} is no folder, and from the Hugging Face Hub it cannot be had: {reason} "
        f"({type(error).__name__}: {detail})"
    )
