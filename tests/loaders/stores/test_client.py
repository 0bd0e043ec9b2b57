"""Requests to stores: against a real S3 server, and against servers that fail, are silent, or are not there."""

import os
import random
import socket
import threading
import time

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores import client
from fastpmae_loaders.stores.address import parse_address
from fastpmae_loaders.stores.client import Changed, Closed, Missing, Store, StoreError
from tests.stores import BUCKET, SECRET, faulty_server, told


def test_files_are_written_read_listed_and_removed(place):
    store = Store(place)
    data = os.urandom(20 << 20)
    store.put(f"{place.key}/large", data)
    stat = store.stat(f"{place.key}/large")
    assert stat.size == len(data)
    assert store.read(f"{place.key}/large", 9 << 20, 1000, stat.version) == data[9 << 20 : (9 << 20) + 1000]
    store.put(f"{place.key}/new", b"1")
    assert bytes(store.read(f"{place.key}/new")) == b"1"
    assert list(store.files(place.key)) == [(f"{place.key}/large", len(data)), (f"{place.key}/new", 1)]
    store.delete(f"{place.key}/new")
    store.delete(f"{place.key}/new")
    with pytest.raises(Missing, match=f"{place}/new does not exist"):
        store.read(f"{place.key}/new")


def test_a_file_is_uploaded_from_the_disk(place, tmp_path):
    data = os.urandom(18 << 20)
    (tmp_path / "file").write_bytes(data)
    store = Store(place)
    store.put(f"{place.key}/file", tmp_path / "file")
    assert bytes(store.read(f"{place.key}/file")) == data


@pytest.mark.parametrize("begins_behind", [True, False])
def test_a_listing_that_breaks_goes_on_where_it_was(place, monkeypatch, begins_behind):
    import obstore

    store = Store(place)
    for number in range(7):
        store.put(f"{place.key}/{number:03d}", b"x")
    store.put(f"{place.key}-other/000", b"x")
    real, asked = obstore.list, []

    def breaking(bucket, prefix, *, offset, chunk_size):
        asked.append(offset)
        # Azure's store begins anew
        found = real(bucket, prefix, offset=offset if begins_behind else None, chunk_size=2)
        for count, chunk in enumerate(found, 1):
            yield chunk
            if len(asked) < 3 and count == len(asked):
                raise obstore.exceptions.GenericError("kind: Connect")

    monkeypatch.setattr(obstore, "list", breaking)
    assert [key for key, _ in store.files(place.key)] == [f"{place.key}/{number:03d}" for number in range(7)]
    assert asked[0] is None
    assert len(asked) == 3


def test_another_version_and_a_shorter_file_are_told(place):
    store = Store(place)
    store.put(f"{place.key}/file", b"one")
    version = store.stat(f"{place.key}/file").version
    with pytest.raises(Changed, match="ends at byte 3, and byte 5 was to be read"):
        store.read(f"{place.key}/file", 1, 4)
    store.put(f"{place.key}/file", b"two")
    with pytest.raises(Changed, match="no longer the file"):
        store.read(f"{place.key}/file", 0, 3, version)


def test_wrong_credentials_are_a_sentence_without_them(place, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ANOTHERSECRET")
    with pytest.raises(StoreError, match="refuses these credentials") as caught:
        Store(place).first_try(lambda store: store.read(f"{place.key}/file"))
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_credentials_of_a_profile_are_taken(place, s3, no_profile, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = TESTKEYID0000\naws_secret_access_key = {SECRET}\n"
    )
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = http://127.0.0.1:{s3.port}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    store = Store(place)
    store.put(f"{place.key}/file", b"1")
    assert store.stat(f"{place.key}/file").size == 1


def test_a_bucket_that_is_not_there_is_told(place):
    with pytest.raises(Missing, match=r"s3://nobucket/x: there is no such bucket|does not exist"):
        Store(parse_address("s3://nobucket")).first_try(lambda store: store.read("x"))
    with pytest.raises(StoreError, match="no such bucket"):
        list(Store(parse_address("s3://nobucket")).files("x"))


def test_a_store_that_is_not_there_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(client, "FIRST_TRY", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        for port, words in (
            (1, "cannot be connected to|cannot be reached"),
            (silent.getsockname()[1], "cannot be reached"),
        ):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.setenv(name, "x")
            began = time.monotonic()
            with pytest.raises(StoreError, match=words):
                Store(parse_address("s3://bucket")).first_try(lambda store: store.stat("x"))
            assert time.monotonic() - began < 10


def test_without_credentials_the_sentence_says_where_they_are_looked_for(no_profile, monkeypatch):
    text = "Error performing PUT http://169.254.169.254/latest/api/token - Server returned non-2xx status code: 403"
    for scheme, name in (("s3", "AWS_ACCESS_KEY_ID"), ("gs", "GOOGLE_"), ("az", "AZURE_STORAGE_ACCOUNT_KEY")):
        said, passing = client._reason(Exception(text), scheme)
        assert said.startswith("no credentials were found")
        assert name in said
        assert not passing


def test_what_azures_store_answers_is_understood():
    text = "Server returned non-2xx status code: 404 Not Found: <Error><Code>ContainerNotFound</Code></Error>"
    assert client._reason(Exception(text), "az") == ("there is no such container", False)
    text = "Bulk delete request failed for key a: This request is not authorized (code: 403)"
    assert client._reason(Exception(text), "az") == ("the store refuses these credentials", False)


def test_a_server_that_fails_now_and_then_is_asked_again(tmp_path):
    (tmp_path / "data" / BUCKET).mkdir(parents=True)
    data = os.urandom(100_000)
    (tmp_path / "data" / BUCKET / "file").write_bytes(data)
    with faulty_server(tmp_path / "data", error_rate=0.3) as server, told(server):
        store = Store(parse_address(f"s3://{BUCKET}"))
        assert all(store.read("file", start, 1000) == data[start : start + 1000] for start in range(0, 90_000, 3000))
    assert b" 503" in server.log.read_bytes()


def test_a_server_that_comes_back_is_waited_for_and_one_that_does_not_is_told(tmp_path):
    (tmp_path / "data" / BUCKET).mkdir(parents=True)
    (tmp_path / "data" / BUCKET / "file").write_bytes(b"there")
    with faulty_server(tmp_path / "data") as server, told(server):
        store = Store(parse_address(f"s3://{BUCKET}"))
        server.kill()
        threading.Timer(1.0, server.start).start()
        assert bytes(store.read("file")) == b"there"
        server.kill()
        store.deadline = 1.0
        drawn = random.getstate()
        with pytest.raises(StoreError, match="cannot be connected to; it was tried for"):
            store.read("file")
        assert random.getstate() == drawn  # a training may draw from it meanwhile


def test_a_close_ends_the_wait(tmp_path, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        store = Store(parse_address("s3://bucket"))
        threading.Timer(0.5, store.close).start()
        began = time.monotonic()
        with pytest.raises(Closed):
            store.read("file")
        assert time.monotonic() - began < 5


def test_a_file_of_the_web_is_read(tmp_path):
    import functools
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    (tmp_path / "file").write_bytes(b"0123456789")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = Store(parse_address(f"http://127.0.0.1:{server.server_address[1]}"))
        assert store.stat("file").size == 10
        assert bytes(store.read("file")) == b"0123456789"
        server.shutdown()


def test_a_setting_that_no_store_takes_is_a_sentence(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    with pytest.raises(UserError, match="az://container/x cannot be opened"):
        Store(parse_address("az://container/x"))


def test_a_thread_that_is_to_end_gives_a_request_up(tmp_path):
    """In a pause between two tries, and within one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):  # nobody listens there; and one that never answers
            store = Store(parse_address(f"http://127.0.0.1:{port}/set"), deadline=60)
            stopped, ended = threading.Event(), []

            def work(store=store, stopped=stopped, ended=ended) -> None:
                with client.waits_end_when(stopped.is_set), pytest.raises(Closed):
                    store.stat("set/part-0.beton")
                ended.append(True)

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            time.sleep(1.5)
            stopped.set()
            thread.join(3)
            assert ended == [True]
