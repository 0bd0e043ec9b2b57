"""With which credentials and which endpoint a bucket is opened, by what the environment says."""

import json
import os

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import parse_address
from fastpmae_loaders.stores.client import Missing, Store, StoreError
from fastpmae_loaders.stores.opening import open_bucket
from tests.stores import BUCKET, s3_server

KEY = "c2VjcmU="
SERVER = "http://127.0.0.1:10000/devstoreaccount1"


@pytest.fixture(autouse=True)
def no_settings(no_profile, monkeypatch):
    """Nothing of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_EMULATOR_", "SERVICE_ACCOUNT")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """A server that takes the requests of Google's XML interface, which are S3's, and looks at nobody's credentials."""
    with s3_server(tmp_path_factory.mktemp("emulator"), keys=False) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        (
            {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=me;AccountKey={KEY};EndpointSuffix=core.host"},
            {"account_name": "me", "account_key": f"{KEY}", "endpoint": "https://me.blob.core.host"},
        ),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint={SERVER}/;AccountName=me;",
                "AZURE_STORAGE_ACCOUNT_NAME": "another",
                "AZURE_STORAGE_ENDPOINT": "https://other",
            },
            {"account_name": "me", "endpoint": SERVER},
        ),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://me.blob.host;SharedAccessSignature=sv=1&sig=x%3D"
            },
            {"account_name": "me", "endpoint": "https://me.blob.host", "sas_key": "sv=1&sig=x%3D"},
        ),
        ({"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"}, {"use_emulator": "true"}),
        ({"AZURE_STORAGE_ACCOUNT": "me", "AZURE_STORAGE_KEY": KEY}, {"account_name": "me", "account_key": KEY}),
        # a slash at its end would be part of what is signed
        (
            {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ENDPOINT": f"{SERVER}/"},
            {"account_name": "me", "endpoint": SERVER},
        ),
    ],
)
def test_azures_settings_are_taken_as_its_own_tools_take_them(environment, settings, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_bucket(parse_address("az://container/x"))
    assert settings.items() <= store.config.items()
    assert store.client_options["allow_http"] == str(settings.get("endpoint", "").startswith("http:")).lower()


@pytest.mark.parametrize(
    ("address", "environment", "says"),
    [
        ("az://container", {}, "nothing names the storage account"),
        ("az://container", {"AZURE_STORAGE_CONNECTION_STRING": f"{KEY};x"}, "has neither an AccountName nor"),
        ("az://container", {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_KEY": f"!{KEY}"}, "a setting AZURE_…"),
        ("gs://bucket", {"GOOGLE_SERVICE_ACCOUNT": "/nowhere"}, "or a file that one names"),
        (
            "gs://bucket",
            {"GOOGLE_SERVICE_ACCOUNT": "/a", "STORAGE_EMULATOR_HOST": "localhost:1"},
            "unset one of the two",
        ),
        ("s3://bucket", {"AWS_CONFIG_FILE": __file__}, "no file of AWS profiles"),
    ],
)
def test_settings_that_are_none_are_a_sentence_without_them(address, environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as caught:
        Store(parse_address(f"{address}/x"))
    assert KEY not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_emulator_of_googles_store_is_written_and_read(emulator, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    store = Store(parse_address(f"gs://{BUCKET}"), deadline=20)
    data = bytes(range(256)) * (40 << 10)  # in two parts
    store.put("folder/file", data)
    store.put("folder/small", b"1")
    stat = store.stat("folder/file")
    assert store.read("folder/file", 9 << 20, 1000, stat.version) == data[9 << 20 : (9 << 20) + 1000]
    assert list(store.files("folder")) == [("folder/file", len(data)), ("folder/small", 1)]
    store.try_to_write(parse_address(f"gs://{BUCKET}/folder"))
    store.delete("folder/small")
    with pytest.raises(Missing, match="folder/small does not exist"):
        store.read("folder/small")
    with pytest.raises(StoreError, match="gs://nobucket/x: there is no such bucket"):
        list(Store(parse_address("gs://nobucket")).files("x"))


def test_the_endpoint_of_a_service_account_may_be_one_without_encryption(emulator, tmp_path, monkeypatch):
    account = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account |= {"gcs_base_url": f"http://{emulator}", "disable_oauth": True}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    with pytest.raises(Missing):
        Store(parse_address(f"gs://{BUCKET}"), deadline=5).stat("nothing")
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", (tmp_path / "account.json").read_text())
    with pytest.raises(Missing):
        Store(parse_address(f"gs://{BUCKET}"), deadline=5).stat("nothing")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("typo", r"AWS_PROFILE names the profile typo, which is in neither of .*credentials and .*config"),
        ("sso", "the AWS profile sso has its keys by sso_session, which is not read here"),
        ("role", "the AWS profile role has its keys by role_arn"),
        ("process", "the AWS profile process has its keys by credential_process"),
    ],
)
def test_a_profile_that_gives_no_keys_is_told(name, said, tmp_path, monkeypatch):
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "credentials").write_text("[keys]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text(
        "[profile sso]\nsso_session = x\nregion = eu-west-1\n"
        "[profile role]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = keys\n"
        "[profile process]\ncredential_process = /bin/get\n"
        "[profile keys]\nrole_arn = \nregion = eu-west-2\n"
    )
    monkeypatch.setenv("AWS_PROFILE", name)
    with pytest.raises(UserError, match=said):
        open_bucket(parse_address("s3://bucket"))
    monkeypatch.setenv("AWS_PROFILE", "keys")
    assert open_bucket(parse_address("s3://bucket")).config["region"] == "eu-west-2"
    # without a name the machine's own role may serve
    monkeypatch.delenv("AWS_PROFILE")
    open_bucket(parse_address("s3://bucket"))
    # nor does a bucket that everybody may read need a profile's keys
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    open_bucket(parse_address("s3://bucket"))
