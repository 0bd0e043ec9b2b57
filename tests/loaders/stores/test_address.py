"""Addresses of stores: what is one, and what is refused in a sentence."""

from pathlib import Path

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import Address, is_address, parse_address, place_of


@pytest.mark.parametrize(
    ("text", "scheme", "bucket", "key"),
    [
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("S3://bucket/set/", "s3", "bucket", "set"),
        ("gs://my-bucket/a/b.beton", "gs", "my-bucket", "a/b.beton"),
        ("az://container/a b.beton", "az", "container", "a b.beton"),
        ("https://host.org:8443/a/b.tar", "https", "host.org:8443", "a/b.tar"),
        ("http://127.0.0.1:8080/x.beton", "http", "127.0.0.1:8080", "x.beton"),
    ],
)
def test_an_address_is_read(text, scheme, bucket, key):
    assert parse_address(text) == Address(scheme, bucket, key)


def test_it_is_written_as_it_is_read():
    address = parse_address("s3://bucket/set/part-00000.beton")
    assert parse_address(str(address)) == address
    assert (address.name, address.suffix, str(address.parent)) == ("part-00000.beton", ".beton", "s3://bucket/set")
    assert str(parse_address("s3://bucket") / "index.json") == "s3://bucket/index.json"
    assert parse_address("s3://bucket/x").parent == parse_address("s3://bucket")


def test_a_path_made_of_an_address_is_still_one():
    assert parse_address(Path("s3://bucket/run")) == parse_address("s3://bucket/run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hdfs://name/x", "hdfs:// is not supported"),
        ("s3:///key", "names no bucket"),
        ("https://", "names no host"),
        ("s3://b*d/x", "no bucket can be called"),
        ("http://example.org/x", "not encrypted"),
        ("s3://b/a//c", "plain names"),
        ("s3://b/../c", "plain names"),
        ("s3://b/a\nb", "plain names"),
        ("s3://b/" + "x" * 1025, "so long a name"),
        ("https://host/a?X-Amz-Signature=SECRET", "often holds credentials"),
        ("s3://bucket/a.beton?X-Amz-Signature=SECRET", "often holds credentials"),
        ("az://container/a.beton?sig=SECRET", "often holds credentials"),
        ("https://KEY:SECRET@host/a", "holds no credentials"),
        ("s3://KEY:SECRET@bucket/a", "holds no credentials"),
    ],
)
def test_what_is_no_address_is_a_sentence_without_secrets(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_address(text)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_address("s3://bucket/x")
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert not is_address("s3://bucket/x")
    assert place_of("s3:/bucket") == Path("s3:/bucket")
    assert isinstance(place_of("gs://bucket/x"), Address)
    assert not is_address(3)
