"""File systems of URLs, through fsspec, which is imported when a URL is first opened.

Every part of Byteloom that opens a URL does it here: sources, corpora and checkpoints.
"""

from typing import Any

from byteloom.core.packages import MissingPackageError, missing, needed_by

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "http": "aiohttp",
    "https": "aiohttp",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface-hub",
}
"""Packages that fsspec needs, by protocol. For other protocols its own message names the package."""
S3 = ("s3", "s3a")
WEB = ("http", "https")


def is_url(location: str) -> bool:
    """Return whether a location is a URL; other locations are paths of this machine."""
    return "://" in location and not location.startswith("file://")


def is_web(location: str) -> bool:
    """Return whether a location is at a web server."""
    return protocol_of(location) in WEB


def protocol_of(url: str) -> str:
    """Return the part of a URL before `://`."""
    return url.partition("://")[0]


def split_query(url: str) -> tuple[str, str]:
    """Return the part of a web address before its query, and the query with its `?`; other URLs have no query."""
    path, mark, query = url.partition("?") if is_web(url) else (url, "", "")
    return path, mark + query


def join_url(url: str, name: str) -> str:
    """Return the URL of a file below a URL. A query, such as a signature, stays at the end."""
    path, query = split_query(url)
    return f"{path.rstrip('/')}/{name}{query}"


def without_query(url: str) -> str:
    """Return a URL without its query, which may hold a signature, and without a slash at its end."""
    return split_query(url)[0].rstrip("/")


def file_system(
    url: str,
    *,
    connect_seconds: float | None = None,
    read_seconds: float | None = None,
    attempts: int | None = None,
) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. It caches no listings.

    Args:
        url: a URL, or a path of this machine.
        connect_seconds: longest time to connect to a web server or S3.
        read_seconds: longest time to wait for the next bytes. Both or neither are given.
        attempts: times that an S3 request is made; S3's client then does not repeat requests by itself. The file
            system is not shared with others. None shares one of each kind, with fsspec's own settings.

    Raises:
        MissingPackageError: the package for URLs of this kind is not installed.
        ValueError: fsspec knows no URLs of this kind.
    """
    from fsspec.core import url_to_fs  # noqa: PLC0415 - only URLs are worth its time

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": attempts is not None}
    if protocol_of(url) in WEB:
        # A server that compresses its answers would send ranges of the compressed bytes.
        options["headers"] = {"Accept-Encoding": "identity"}
        options["client_kwargs"] = {"trust_env": True}  # proxies of the environment, as every other client has them
        if read_seconds is not None:
            options["client_kwargs"]["timeout"] = _web_timeout(url, connect_seconds, read_seconds)
    elif protocol_of(url) in S3:
        client = dict[str, Any]()
        if read_seconds is not None:
            client |= {"connect_timeout": connect_seconds, "read_timeout": read_seconds}
        if attempts is not None:
            client["retries"] = {"total_max_attempts": 1}
        if client:
            options["config_kwargs"] = client
    try:
        files, path = url_to_fs(url, **options)
    except ImportError as error:
        if package := PACKAGES.get(protocol_of(url)):
            raise missing(url, package, error) from error
        raise MissingPackageError(f"{url} cannot be opened: {error}") from error
    if attempts is not None and protocol_of(url) in S3:
        files.retries = attempts
    return files, path


def _web_timeout(url: str, connect_seconds: float | None, read_seconds: float) -> Any:
    with needed_by(url, "aiohttp"):
        from aiohttp import ClientTimeout  # noqa: PLC0415 - it takes a third of a second

    # aiohttp's default ends every request after five minutes.
    return ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds)
