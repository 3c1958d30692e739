"""Hub ids `org/name@revision`, resolved through huggingface_hub's cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial

from weightsurgery.errors import StorageError, shown
from weightsurgery.formats.layout import (
    ADAPTER_CONFIG,
    CARD,
    CHAT_TEMPLATES,
    PICKLED_ADAPTER,
    PICKLES,
    SIDE_FILES,
    TEXTS,
    WEIGHTS,
)

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(text: str) -> bool:
    """True for `org/name` and `org/name@revision`.

    Example:
        >>> is_hub_id("org/name@v1"), is_hub_id("./folder/name"), is_hub_id("name")
        (True, False, False)
        >>> is_hub_id("folder/x.safetensors")
        False
    """
    is_path = text.startswith((".", "/")) or text.endswith(".safetensors")
    return _ID.fullmatch(text) is not None and not is_path


def snapshots(text: str) -> Iterator[str]:
    """Local snapshot directories of a hub id: what the cache has, then what the hub has.

    The first may be incomplete; asking for the second downloads what is missing, and for the third
    PyTorch files too, for a model or an adapter that has no others. Where the cache lies, whether
    the network may be used, and which token is sent are huggingface_hub's business (HF_HOME,
    HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN).

    Args:
        text: The hub id.

    Raises:
        StorageError: It is not in the cache and could not be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = _ID.fullmatch(text)
    repo, revision = (found["repo"], found["revision"]) if found else (text, None)
    below = (f"*/{pattern}" for pattern in SIDE_FILES if pattern not in TEXTS)  # of parts
    wanted = [*WEIGHTS, *SIDE_FILES, *below, f"{CHAT_TEMPLATES}/*", CARD, ADAPTER_CONFIG]
    fetch = partial(snapshot_download, repo, revision=revision, allow_patterns=wanted)
    try:
        # Not an error: the next call may use the network, or says why it may not.
        with contextlib.suppress(LocalEntryNotFoundError):
            yield str(fetch(local_files_only=True))
        yield str(fetch())
        yield str(fetch(allow_patterns=[*wanted, *PICKLES, PICKLED_ADAPTER]))
    except Exception as error:  # an id it does not like, HTTP, proxies, disk: many kinds
        reason = shown(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise StorageError(
            f"'{text}' is neither a local path nor a hub repository that can be fetched ({reason})",
            hint="check the spelling, or download the model and give its folder",
            code="E-HUB",
        ) from error
