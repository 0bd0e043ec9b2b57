"""Addresses of files in object stores: s3://bucket/key, gs://bucket/key, az://container/key, https://host/path."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import SCHEME, local_path

SCHEMES = ("s3", "gs", "az", "https")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_HOST = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:]{2,45}\])(:[0-9]{1,5})?")
_LONGEST_KEY = 1024
"""Bytes: what S3 and Google's store allow, and Azure's in characters."""


@dataclass(frozen=True)
class Address:
    """A file or folder in a store; a folder's address is written without a slash at its end.

    Attributes:
        scheme: "s3", "gs", "az", or "https"; "http" for this machine alone.
        bucket: the bucket or container; of https the host, with its port where one is named.
        key: the name within it, without a slash in front or at the end; empty for all of it.
    """

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __fspath__(self) -> str:
        # so that it may stand wherever a path may: who opens files of this machine alone says so (`local_path`)
        return str(self)

    def __truediv__(self, name: str) -> "Address":
        return parse_address(f"{self}/{name}")

    @classmethod
    def of_text(cls, text: object) -> "Address | None":
        """The address that a text or path says (see `is_address`); None where it says none.

        Raises:
            UserError: as `parse_address`.
        """
        return parse_address(text) if isinstance(text, str | os.PathLike) and is_address(text) else None

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The name's ending, from its last dot on."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "Address":
        """The folder that it lies in; a bucket's is the bucket."""
        return Address(self.scheme, self.bucket, self.key.rpartition("/")[0])


def is_address(path: object) -> bool:
    """Whether a text or path is an address rather than a file's name; what is there under that name is a file's.

    A `Path` that was made of an address has lost one of its two slashes.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        return isinstance(path, Address)
    found = SCHEME.match(text)
    return found is not None and not os.path.lexists(f"{found[1]}:")


def parse_address(path: str | os.PathLike[str] | Address) -> Address:
    """The address that a text says.

    Raises:
        UserError: one sentence, for another scheme, credentials in the text, and names that no store has.
    """
    if isinstance(path, Address):
        return path
    text = os.fspath(path)
    found = SCHEME.match(text)
    if found is None:
        raise UserError(f"{printable(text)} is no address of a store, such as s3://bucket/folder")
    scheme, rest = found[1].lower(), text[found.end() :]
    if text[found.end(1) :].startswith(":///"):
        rest = "/" + rest
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise UserError(
            f"{scheme}://…@{printable(bucket.rpartition('@')[2])}: an address holds no credentials, since it is "
            "written into logs: leave them to the environment or a profile"
        )
    shown = printable(f"{scheme}://{rest}")
    web = scheme in ("https", "http")
    if "?" in rest or (web and "#" in rest):
        before = printable(re.split("[?#]", rest)[0])
        raise UserError(
            f"{scheme}://{before}?…: an address is written into logs, and what follows a ? often holds credentials: "
            "name a file without it"
        )
    if scheme == "http" and bucket.rpartition(":")[0] not in _LOCAL_HOSTS:
        raise UserError(f"{shown}: http:// is not encrypted, and taken for servers on this machine alone; use https://")
    if scheme not in (*SCHEMES, "http"):
        raise UserError(
            f"{shown}: {scheme}:// is not supported; name a file or folder of this machine, or an address that begins "
            f"with {', '.join(f'{name}://' for name in SCHEMES[:-1])} or {SCHEMES[-1]}://"
        )
    kind = "host" if web else "bucket"
    if not bucket:
        raise UserError(f"{shown} names no {kind}: write {scheme}://{kind.upper()}/…")
    if not (_HOST if web else _BUCKET).fullmatch(bucket):
        raise UserError(f"{shown}: no {kind} can be called {printable(bucket)!r}")
    key = key.removesuffix("/")
    parts = key.split("/") if key else []
    if any(part in ("", ".", "..") for part in parts) or not key.isprintable():
        raise UserError(f"{shown}: its folders and its file must have plain names, none of them empty, '.' or '..'")
    if len(key.encode("utf-8", "surrogateescape")) > _LONGEST_KEY:
        raise UserError(f"{printable(text[:80])}…: no store has so long a name ({_LONGEST_KEY:,} bytes at most)")
    return Address(scheme, bucket, key)


def place_of(path: str | os.PathLike[str] | Address) -> Path | Address:
    """A path of this machine, or the address that a text says. UserError as `parse_address` and `local_path`."""
    return parse_address(path) if isinstance(path, Address) or is_address(path) else local_path(path)
