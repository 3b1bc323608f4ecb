"""Repositories of the Hugging Face Hub that are in this machine's cache, for work without a network.

With a network, fsspec opens `hf://…` through huggingface_hub's HfFileSystem, as any other URL. With HF_HUB_OFFLINE=1,
the source is the snapshot that an earlier download has left in the cache of huggingface_hub.
"""

import re
from pathlib import Path
from urllib.parse import unquote

from byteloom.core.packages import needed_by
from data_pipeline.errors import CorpusError

HUB_URL = re.compile(
    r"hf://(?:(?P<kind>dataset|model|space)s/)?(?P<repository>(?!(?:dataset|model|space)s/)[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
"""`hf://datasets/OWNER/NAME@REVISION/PATH`; without a kind it is a model."""


def cached_snapshot(source: str) -> Path | None:
    """Return the folder or file of the cache that a source `hf://…` is; None if the network is to be used.

    Raises:
        CorpusError: the cache is to be used, and has no such repository, revision, folder or file.
        MissingPackageError: huggingface_hub is not installed.
    """
    if not source.startswith("hf://"):
        return None
    with needed_by(source, "huggingface-hub"):
        from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - only its URLs need it

    if not constants.HF_HUB_OFFLINE:
        return None
    parts = HUB_URL.fullmatch(source)
    if parts is None:
        raise CorpusError(f"{source} names no repository of the Hub; write hf://datasets/OWNER/NAME")
    revision = parts["revision"] and unquote(parts["revision"])
    absent = f"{source} is not in the cache of huggingface_hub, and HF_HUB_OFFLINE is set"
    try:
        folder = snapshot_download(
            parts["repository"], repo_type=parts["kind"] or "model", revision=revision, local_files_only=True
        )
    except (FileNotFoundError, ValueError) as error:  # the errors of huggingface_hub are of these classes
        raise CorpusError(absent) from error
    path = Path(folder) / (parts["path"] or "")
    if not path.exists():
        raise CorpusError(absent)
    return path
