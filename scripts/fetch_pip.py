"""Fetches the wheel of pip that a virtual environment begins with where Python, as Debian's, comes without ensurepip.

`python scripts/fetch_pip.py FOLDER` puts it into FOLDER and prints its path. It comes from the index that pip is
configured for (its environment variables and pip.conf, PyPI otherwise), and is taken only if it is the very file that
is named here. Standard library alone: nothing else is there yet.
"""

import base64
import configparser
import hashlib
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

WHEEL = "pip-25.3-py3-none-any.whl"
DIGEST = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
"""Its SHA-256, as PyPI has it."""
PYPI = "https://pypi.org/simple"
_SECONDS = 60


class FetchError(Exception):
    """Why there is no wheel, in one sentence."""


def settings() -> dict[str, str]:
    """What pip would be told: of its configuration files the later ones win, and environment variables over all."""
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    places = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf"]
    places += [home / "Library/Application Support/pip/pip.conf", config / "pip/pip.conf"]
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        places = []
    elif named:
        places.append(Path(named))
    found: dict[str, str] = {}
    for place in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(place, encoding="utf-8")
        except (OSError, UnicodeError, configparser.Error):
            continue  # pip itself will say what is wrong with it
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update((key.replace("_", "-"), value) for key, value in parser.items(section))
    for name in ("index-url", "extra-index-url", "find-links", "cert", "proxy"):
        value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            found[name] = value
    return found


def pages(told: dict[str, str]) -> Iterator[str]:
    """Addresses of the pages that may list the wheel: of folders and pages of links, then of indexes."""
    for place in told.get("find-links", "").split():
        yield Path(place).absolute().as_uri() if "://" not in place else place
    for index in (told.get("index-url", PYPI), *told.get("extra-index-url", "").split()):
        yield index.rstrip("/") + "/pip/"


class Reader:
    """Reads addresses the way pip is told to: through its proxy, trusting its certificates."""

    def __init__(self, told: dict[str, str]) -> None:
        proxy = told.get("proxy")
        self._handlers = [urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None)]
        certificates = told.get("cert")
        self._context = ssl.create_default_context(cafile=certificates if certificates else None)

    def read(self, address: str) -> bytes:
        """The bytes at an address. OSError where there are none."""
        try:
            return self._read(address, self._context)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                raise
            # A system without any certificates, as small images are: the digest alone decides what is taken.
            return self._read(address, ssl._create_unverified_context())

    def _read(self, address: str, context: ssl.SSLContext) -> bytes:
        parts = urllib.parse.urlsplit(address)
        request = urllib.request.Request(address)
        if parts.username is not None:
            word = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
            request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(word.encode()).decode())
        opener = urllib.request.build_opener(*self._handlers, urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=_SECONDS) as answer:
            return answer.read()


def addresses(reader: Reader, page: str) -> Iterator[str]:
    """Where a page says that the wheel lies."""
    if page.startswith("file:"):
        folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(page).path))
        if (folder / WHEEL).is_file():
            yield (folder / WHEEL).as_uri()
        if folder.is_dir():
            if not (folder / "index.html").is_file():
                return
            page = (folder / "index.html").as_uri()
    for link in re.findall(r"""href\s*=\s*["']([^"']+)["']""", reader.read(page).decode("utf-8", "replace")):
        target = urllib.parse.urldefrag(link)[0]
        if urllib.parse.urlsplit(target).path.rpartition("/")[2] == WHEEL:
            yield urllib.parse.urljoin(page, target)


def fetch(folder: Path) -> Path:
    """The wheel, put into `folder` under its name. FetchError where no place has it, or not that very file."""
    told = settings()
    reader, reasons = Reader(told), []
    for page in pages(told):
        shown = re.sub(r"//[^/@]*@", "//", page)  # a password is not for a log
        reason = f"{shown} does not list it"
        try:
            for address in addresses(reader, page):
                wheel = reader.read(address)
                if hashlib.sha256(wheel).hexdigest() == DIGEST:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / WHEEL).write_bytes(wheel)
                    return folder / WHEEL
                reason = f"{shown} has a file of that name with other bytes"
        except (OSError, ValueError) as error:
            reason = f"{shown}: {getattr(error, 'reason', None) or error}"
        reasons.append(reason)
    raise FetchError(f"{WHEEL} could not be fetched ({'; '.join(reasons)})")


def main() -> int:
    try:
        print(fetch(Path(sys.argv[1])))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
