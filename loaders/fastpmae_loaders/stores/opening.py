"""A bucket as obstore opens it, with the credentials and the endpoint that the environment names.

obstore reads most variables itself. What is done here is what it leaves: AWS profiles, Azure's connection string, the
names that Azure's and Google's own tools know, and whether an endpoint may be without encryption, which it is only
where it is named so.
"""

import configparser
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address

ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
"""By scheme the variable that names another server than the public one."""
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING",
}
"""By scheme where credentials are usually given."""

_CONNECT, _STALL, _WHOLE = "5s", "20s", "120s"
_MISSING = (
    "{address}: reading from and writing to object stores needs the package obstore, which is not installed here: "
    "pip install 'fastpmae-loaders[stores]'"
)


def open_bucket(address: Address) -> Any:
    """obstore's own object for a bucket.

    Raises:
        UserError: without obstore, and for settings of the environment that are none.
    """
    try:
        import obstore.store as stores
    except ImportError:
        raise UserError(_MISSING.format(address=address)) from None
    kinds = {"s3": (stores.S3Store, _amazon), "gs": (stores.GCSStore, _google), "az": (stores.AzureStore, _azure)}
    # a fault that is gone at once need not come back to Python; what lasts is tried again by the client, where it can
    # be ended
    retry = {"max_retries": 2, "backoff": {"init_backoff": _seconds(0.05), "max_backoff": _seconds(0.5), "base": 2}}
    client: dict[str, Any] = {"connect_timeout": _CONNECT, "read_timeout": _STALL, "timeout": _WHOLE}
    common: dict[str, Any] = {"retry_config": retry | {"retry_timeout": _seconds(10)}, "client_options": client}
    kind, read_settings = kinds.get(address.scheme, (None, None))
    settings, endpoint = read_settings(address) if read_settings else ({}, str(Address(address.scheme, address.bucket)))
    client["allow_http"] = endpoint.lower().startswith("http://")
    try:
        return kind(address.bucket, **settings, **common) if kind else stores.HTTPStore.from_url(endpoint, **common)
    except Exception:  # its text may hold the settings
        prefix = {"s3": "AWS_… ", "gs": "GOOGLE_… ", "az": "AZURE_… "}.get(address.scheme, "")
        raise UserError(
            f"{address} cannot be opened: a setting {prefix}of the environment, or a file that one names, is none that "
            "such a store takes"
        ) from None


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def _first(*names: str) -> str:
    """What the first of these variables says that is not empty."""
    return next(filter(None, map(os.environ.get, names)), "")


def _amazon(address: Address) -> tuple[dict[str, Any], str]:
    """obstore's settings for S3, and the endpoint."""
    settings = _profile() if "AWS_ACCESS_KEY_ID" not in os.environ else {}
    endpoint = settings.get("endpoint") or _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return settings, endpoint


def _google(address: Address) -> tuple[dict[str, Any], str]:
    """obstore's settings for Google's store, and the endpoint."""
    files = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT")
    emulator = _first("STORAGE_EMULATOR_HOST").rstrip("/")
    if not emulator:
        if endpoint := _first("GOOGLE_BASE_URL").rstrip("/"):
            return {"base_url": endpoint}, endpoint
        return {}, _endpoint_of_account(_first("GOOGLE_SERVICE_ACCOUNT_KEY"), files)
    # an emulator is sent no credentials of the real store; obstore takes one only in the place of a service account
    for name in ("GOOGLE_BASE_URL", "GOOGLE_SERVICE_ACCOUNT_KEY", *files):
        if os.environ.get(name):
            raise UserError(
                f"{address} cannot be opened: STORAGE_EMULATOR_HOST names an emulator, and {name} another server or "
                "its credentials; unset one of the two"
            )
    endpoint = emulator if "://" in emulator else f"http://{emulator}"
    account = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account |= {"gcs_base_url": endpoint, "disable_oauth": True}
    return {"service_account_key": json.dumps(account)}, endpoint


def _endpoint_of_account(text: str, files: tuple[str, ...]) -> str:
    """The endpoint that a service account names; empty where it names none. obstore says what is wrong with one."""
    try:
        path = _first(*files)
        account = json.loads(text or (Path(path).read_text(encoding="utf-8") if path else "{}"))
    except (OSError, ValueError):
        return ""
    endpoint = account.get("gcs_base_url") if isinstance(account, dict) else None
    return endpoint if isinstance(endpoint, str) else ""


def _azure(address: Address) -> tuple[dict[str, Any], str]:
    """obstore's settings for Azure's store, and the endpoint; the emulator's obstore allows by itself."""
    endpoint = _first("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT").rstrip("/")
    emulated = _first("AZURE_STORAGE_USE_EMULATOR").strip().lower() in ("1", "true", "on", "yes", "y", "t")
    if not emulated and (text := _first("AZURE_STORAGE_CONNECTION_STRING")):
        settings = _connection(text, address)
        return settings, settings.get("endpoint", "")
    settings = {"endpoint": endpoint} if endpoint else {}
    # the last are the names that the az tool knows
    if name := _first("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        settings["account_name"] = name
    elif not emulated:
        raise UserError(
            f"{address} cannot be opened: nothing names the storage account that the container is in; set "
            "AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING"
        )
    ours = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")
    if key := _first(*ours, "AZURE_STORAGE_KEY"):
        settings["account_key"] = key
    return settings, endpoint


def _connection(text: str, address: Address) -> dict[str, Any]:
    """obstore's settings from one of Azure's connection strings; it reads none itself."""
    pairs = (part.partition("=") for part in text.split(";") if part.strip())
    found = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if found.get("usedevelopmentstorage", "").lower() == "true":
        return {"use_emulator": True}
    account, endpoint = found.get("accountname", ""), found.get("blobendpoint", "").rstrip("/")
    if account and not endpoint:
        protocol = found.get("defaultendpointsprotocol", "https")
        endpoint = f"{protocol}://{account}.blob.{found.get('endpointsuffix', 'core.windows.net')}"
    # a string with a signature in place of a key need not name the account
    account = account or endpoint.partition("://")[2].partition(".")[0]
    if not account or not urlsplit(endpoint).netloc:
        raise UserError(
            f"{address} cannot be opened: AZURE_STORAGE_CONNECTION_STRING has neither an AccountName nor a BlobEndpoint"
        )
    keys = {"accountkey": "account_key", "sharedaccesssignature": "sas_key"}
    given = {ours: found[theirs] for theirs, ours in keys.items() if found.get(theirs)}
    return {"account_name": account, "endpoint": endpoint} | given


_ELSEWHERE = ("sso_session", "sso_start_url", "role_arn", "credential_process", "web_identity_token_file")
"""What says in a profile that its keys come from another program or server."""

_WITHOUT_PROFILE = (
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables that obstore reads, by which no profile's keys are needed."""


def _profile() -> dict[str, str]:
    """Keys, region and endpoint of the AWS profile in use, from the files that its own tools read; obstore does not.

    Raises:
        UserError: for a profile that is named and not there, and for one whose keys another program must fetch.
    """
    name = os.environ.get("AWS_PROFILE", os.environ.get("AWS_DEFAULT_PROFILE", "default"))
    home = Path("~/.aws").expanduser()
    files = {
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"): name,
        os.environ.get("AWS_CONFIG_FILE", home / "config"): name if name == "default" else f"profile {name}",
    }
    wanted = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    found: dict[str, str] = {}
    every: set[str] = set()
    there = False
    for path, section in files.items():
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read(path, encoding="utf-8")
            values = dict(parser[section]) if section in parser else {}
            there |= section in parser
            every |= {key for key, value in values.items() if value}
        except (configparser.Error, OSError, UnicodeDecodeError):
            raise UserError(f"{path} is no file of AWS profiles that can be read") from None
        found |= {ours: values[theirs] for theirs, ours in wanted.items() if values.get(theirs)}
    if not there and name != "default":
        raise UserError(
            f"AWS_PROFILE names the profile {printable(name)}, which is in neither of "
            f"{' and '.join(printable(str(path)) for path in files)}: see to its name there, or unset AWS_PROFILE"
        )
    elsewhere = [key for key in _ELSEWHERE if key in every]
    given = any(map(os.environ.get, _WITHOUT_PROFILE))
    if elsewhere and not given and not found.keys() >= {"access_key_id", "secret_access_key"}:
        raise UserError(
            f"the AWS profile {printable(name)} has its keys by {elsewhere[0]}, which is not read here (nor are "
            f"{', '.join(key for key in _ELSEWHERE if key != elsewhere[0])}): put keys in the environment, as with "
            f'eval "$(aws configure export-credentials --profile {printable(name)} --format env)"'
        )
    variables = {
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    }
    for setting, names in variables.items():
        if any(os.environ.get(variable) for variable in names):
            found.pop(setting, None)
    return (
        found
        if "access_key_id" in found and "secret_access_key" in found
        else {setting: found[setting] for setting in ("region", "endpoint") if setting in found}
    )
