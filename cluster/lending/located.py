"""Where a node finds its checkpoint: in the folder, or else with lenders.

What is small (configuration, tokenizer, templates, index) is copied, since everybody opens it by
its path; weights are read from lenders each time.
"""

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cluster.errors import FilesUnavailableError
from cluster.folders import checkpoint_folder, lacks_folder
from cluster.lending.borrower import BorrowedFolder, Borrower
from model.hub import is_small_file
from model.weight_folder import WeightFolder

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/maestrale/checkpoints")
"""For what is copied."""


@dataclass(frozen=True)
class Located:
    """A checkpoint as this node has it. weights: None where they are in the folder."""

    folder: Path
    weights: WeightFolder | None = None


def locate(model: Path | None, new_borrower: Callable[[Path], Borrower]) -> Located:
    """The folder of this node, or copies of its small files and a way to read the rest.

    Raises CheckpointError when there is no such model, FilesUnavailableError when it cannot be
    borrowed.
    """
    if not lacks_folder(model):
        return Located(checkpoint_folder(model))
    logger.info("%s is not on this node: asking others for it", model)
    borrowed = BorrowedFolder(new_borrower(model))
    return Located(copied(borrowed, CACHE.expanduser()), borrowed)


def copied(borrowed: BorrowedFolder, cache: Path) -> Path:
    """A folder below `cache` with all small files, copied where they are not there yet.

    It is named by their content, so what is in it never changes. Raises FilesUnavailableError.
    """
    digests = {name: f.sha256 for name, f in borrowed.files.items() if is_small_file(name)}
    listed = b"".join(name.encode() + digest for name, digest in sorted(digests.items()))
    folder = cache / f"{borrowed.path.name}-{sha256(listed).hexdigest()[:16]}"
    try:
        for name, digest in digests.items():
            target = folder / name
            if target.is_file() and sha256(target.read_bytes()).digest() == digest:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
            temporary.write_bytes(borrowed.whole(name))
            temporary.replace(target)
            logger.info("copied %s to %s", name, folder)
    except FilesUnavailableError:
        raise
    except OSError as error:
        raise FilesUnavailableError(f"{folder} cannot be written: {error}") from error
    return folder
