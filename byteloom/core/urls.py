"""File systems of URLs, through fsspec, which is imported when a URL is first opened."""

from typing import Any

from byteloom.core.packages import MissingPackageError, missing

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs"}
"""Packages that fsspec needs, by protocol. Of others it says itself what they need."""


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of a URL or a path, and the path in it.

    Args:
        options: of the file system.

    Raises:
        MissingPackageError: the package for URLs of this kind is not installed.
        ValueError: fsspec knows no URLs of this kind.
    """
    from fsspec.core import url_to_fs  # noqa: PLC0415 - only URLs are worth its time

    try:
        files, path = url_to_fs(url, **options)
    except ImportError as error:
        if package := PACKAGES.get(url.partition("://")[0]):
            raise missing(url, package, error) from error
        raise MissingPackageError(f"{url} cannot be opened: {error}") from error
    return files, path
