import contextlib
import dataclasses
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core import units
from tensorflow_datasets.core.download import checksums
from tiny_sources import NAMES, NOWHERE, Tiny, install, refusal, sha256, tiny, tree, with_files

from jvae import data
from jvae.data import raw_files
from jvae.data.catalogue import SOURCES

WITH_CHECKSUM = [name for name in NAMES if name != "omniglot"]
TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = tiny("mnist").files


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy is asked, and no name looked up."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host == "127.0.0.1", host
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# Two places on the disk.


def locate(name: str, data_dir: Path) -> dict[str, Path]:
    return raw_files.locate(SOURCES[name], data_dir)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["downloads/manual", "{name}"])
def test_files_are_found_in_either_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    folder = tmp_path / place.format(name=name)
    made = install(monkeypatch, name, folder)
    assert locate(name, tmp_path) == {file: folder / file for file in made.files}


@pytest.mark.parametrize("name", ["mnist", "omniglot"])
def test_the_manual_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    manual = tmp_path / "downloads" / "manual"
    made = install(monkeypatch, name, tmp_path / name)
    made.write(manual)
    first, *others = made.files
    for file in others:
        (manual / file).unlink()
    expected = {file: tmp_path / name / file for file in others}
    assert locate(name, tmp_path) == {first: manual / first} | expected


def test_a_folder_of_a_files_name_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "omniglot", tmp_path / "omniglot")
    (tmp_path / "downloads" / "manual" / "chardata.mat").mkdir(parents=True)
    path = tmp_path / "omniglot" / "chardata.mat"
    assert locate("omniglot", tmp_path) == {"chardata.mat": path}


def test_a_file_of_another_dataset_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNIST's files and Fashion-MNIST's have the same names: one of both is in its own folder."""
    manual = tmp_path / "downloads" / "manual"
    fashion = install(monkeypatch, "fashion_mnist", manual)
    mnist = install(monkeypatch, "mnist", tmp_path / "mnist")
    assert fashion.files.keys() == mnist.files.keys()
    for made in (mnist, fashion):
        train = data.load(made.source.name, tmp_path).train
        np.testing.assert_array_equal(train, made.arrays["train"])


@pytest.mark.parametrize("places", [["downloads/manual"], ["mnist"], ["downloads/manual", "mnist"]])
def test_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / TEST).unlink()
    for place in places:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / TEST).write_bytes(made.files[TEST][:-1])
    before = tree(tmp_path)
    assert refusal(lambda: data.load("mnist", tmp_path)) == (
        f"{tmp_path / places[0] / TEST} has SHA-256 {sha256(made.files[TEST][:-1])}, mnist's has "
        f"{sha256(made.files[TEST])}: it is cut short or another dataset's file of the same name; "
        "replace it or move it away"
    )
    assert tree(tmp_path) == before


def test_each_of_several_checksums_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of mirrors whose gzip headers differ."""
    made = install(monkeypatch, "kmnist", tmp_path / "kmnist")
    first, *others = made.source.files
    other_header = bytearray(made.files[first.name])
    other_header[4] ^= 1
    either = first._replace(sha256=(sha256(made.files[first.name]), sha256(bytes(other_header))))
    source = dataclasses.replace(made.source, files=(either, *others))
    monkeypatch.setitem(SOURCES, "kmnist", source)
    path = tmp_path / "kmnist" / first.name
    assert locate("kmnist", tmp_path)[first.name] == path
    path.write_bytes(other_header)
    np.testing.assert_array_equal(data.load("kmnist", tmp_path).train, made.arrays["train"])
    path.write_bytes(b"neither")
    message = refusal(lambda: locate("kmnist", tmp_path))
    assert f"kmnist's has {' or '.join(either.sha256)}: it is" in message


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("omniglot", "frey_face")])
def test_checksums_are_those_of_tensorflow_datasets(tmp_path: Path, name: str) -> None:
    """It fetches the same files: those of MNIST are two, of which it knows the first."""
    published = tfds.builder(name, data_dir=tmp_path).url_infos
    for file in SOURCES[name].files:
        assert published[file.url].checksum == file.sha256[0]
        assert published[file.url].filename == file.name


@pytest.mark.parametrize("name", NAMES)
def test_checksums_are_hexadecimal(name: str) -> None:
    files = SOURCES[name].files
    digests = [digest for file in files for digest in file.sha256]
    assert all(bytes.fromhex(digest) and len(digest) == 64 for digest in digests)
    assert all(file.sha256 for file in files) == (name in WITH_CHECKSUM)
    assert len({file.name for file in files}) == len(files)


# No network.


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """Nobody listens there, and the connection is refused at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


@contextlib.contextmanager
def silent_port() -> Iterator[str]:
    """Somebody listens there, who never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> Tiny:
    """The tiny dataset below `url`, and nowhere on the disk."""
    made = tiny(name)
    source = dataclasses.replace(made.source, files=with_files(made.source, made.files, url).files)
    monkeypatch.setitem(SOURCES, name, source)
    return dataclasses.replace(made, source=source)


def needs_mnist(data_dir: Path) -> str:
    """What the message says of the four files of MNIST, the first with its checksum."""
    return (
        f"dataset 'mnist' needs {TRAIN} (SHA-256 {sha256(tiny('mnist').files[TRAIN])}), and "
        f"{TRAIN_LABELS}, {TEST}, {TEST_LABELS}, in {data_dir}/downloads/manual or {data_dir}/mnist"
    )


def test_without_a_network_the_refusal_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_port() as url:
        publish(monkeypatch, "mnist", url)
        start = time.monotonic()
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert time.monotonic() - start < 5
    reason = "no network: cannot reach 127.0.0.1 (ConnectionError)"
    assert message == f"{needs_mnist(tmp_path)}; {reason}"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", WITH_CHECKSUM)
def test_every_refusal_names_the_first_file_and_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = tiny(name)
    monkeypatch.setitem(SOURCES, name, made.source)
    message = refusal(lambda: data.load(name, tmp_path / "new"), data.NoNetworkError)
    first, *others = made.files
    needs = f"dataset {name!r} needs {first} (SHA-256 {sha256(made.files[first])})"
    assert message.startswith(needs)
    assert all(file in message for file in others)
    assert f" in {tmp_path}/new/downloads/manual or {tmp_path}/new/{name}; no network" in message
    assert not (tmp_path / "new").exists()


def test_only_the_files_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / TEST).unlink()
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert message == (
        f"dataset 'mnist' needs {TEST} (SHA-256 {sha256(made.files[TEST])}) in "
        f"{tmp_path}/downloads/manual or {tmp_path}/mnist; no network: cannot reach 127.0.0.1 "
        "(ConnectionError)"
    )
    assert tree(tmp_path) == before


def test_a_network_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_files, "CONNECT_SECONDS", 0.1)
    with silent_port() as url:
        publish(monkeypatch, "mnist", url)
        start = time.monotonic()
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert time.monotonic() - start < 5
    # Whose clock rings first, the request's or the waiting thread's, is open.
    reasons = ("127.0.0.1 does not answer", "cannot reach 127.0.0.1 (ReadTimeout)")
    assert message in [f"{needs_mnist(tmp_path)}; no network: {reason}" for reason in reasons]
    assert tree(tmp_path) == {}


def test_a_name_server_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timeout of a request covers that."""
    over = threading.Event()

    def get(*args: Any, **kwargs: Any) -> None:
        over.wait(timeout=20)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(raw_files, "CONNECT_SECONDS", 0.1)
    publish(monkeypatch, "mnist", NOWHERE)
    start = time.monotonic()
    try:
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    finally:
        over.set()
    assert time.monotonic() - start < 5
    assert message == f"{needs_mnist(tmp_path)}; no network: 127.0.0.1 does not answer"
    assert tree(tmp_path) == {}


def test_a_network_is_given_up_in_seconds() -> None:
    assert 1 <= raw_files.CONNECT_SECONDS <= 10


# Downloads.


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by name; what is missing is answered with `status`.

    Attributes:
      asked: the names that were asked for.
      last: a name that is answered after all others, none of which is then left to a thread of
        tensorflow-datasets that would ask for it in vain until the tests are over.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.status, self.last = dict(files), 404, ""
        self.asked, self.answered = list[str](), list[str]()
        self.progress = threading.Condition()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        self.server.asked.append(name)
        if name == self.server.last:
            # The first file is asked for twice: whether it is there, and for its content.
            others = [TRAIN, *tiny("mnist").files]
            others.remove(name)
            with self.server.progress:
                self.server.progress.wait_for(
                    lambda: sorted(self.server.answered) == sorted(others), timeout=10
                )
        content = self.server.files.get(name)
        self.send_response(self.server.status if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        # Who only asks whether it is there hangs up before the end.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content or b"")
        with self.server.progress:
            self.server.answered.append(name)
            self.server.progress.notify_all()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[tuple[Server, Tiny]]:
    """A server of the raw files of a dataset."""
    with Server(tiny(name).files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server, publish(monkeypatch, name, server.url)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", WITH_CHECKSUM)
def test_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with serving(monkeypatch, name) as (server, made):
        first = data.load(name, tmp_path)
        assert set(server.asked) == made.files.keys()
        server.asked.clear()
        second = data.load(name, tmp_path)
    assert server.asked == []
    for dataset in (first, second):
        for array, expected in made.arrays.items():
            np.testing.assert_array_equal(getattr(dataset, array), expected)
        assert dataset.source == f"raw files in {tmp_path / 'downloads'}"
    kept = set(tree(tmp_path / "downloads").values())
    assert kept >= set(made.files.values())


def test_only_what_is_missing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        made.write(tmp_path / "mnist")
        (tmp_path / "mnist" / TEST).unlink()
        dataset = data.load("mnist", tmp_path)
    assert set(server.asked) == {TEST}
    np.testing.assert_array_equal(dataset.test, made.arrays["test"])
    assert dataset.source == f"raw files in {tmp_path / 'downloads'}, {tmp_path / 'mnist'}"


def test_a_wrong_download_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        server.files[TEST] = b"another file"
        message = refusal(lambda: data.load("mnist", tmp_path))
    needs = needs_mnist(tmp_path).removeprefix("dataset 'mnist' needs ")
    assert message == (
        f"{server.url}{TEST} gave a file of SHA-256 {sha256(b'another file')}, expected "
        f"{sha256(made.files[TEST])}: put {needs}"
    )
    assert b"another file" not in tree(tmp_path).values()
    assert not (tmp_path / "mnist").exists()


def test_a_download_that_tensorflow_datasets_knows_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has checksums of its own, of all datasets here that are also there."""
    with serving(monkeypatch, "mnist") as (server, made):
        known = {
            server.url + name: checksums.UrlInfo(
                size=units.Size(len(content)), checksum=sha256(content), filename=name
            )
            for name, content in made.files.items()
        }
        monkeypatch.setattr(checksums, "get_all_url_infos", known.copy)
        server.files[TEST], server.last = b"another file", TEST
        message = refusal(lambda: data.load("mnist", tmp_path))
    assert sha256(b"another file") in message
    assert sha256(made.files[TEST]) in message
    assert b"another file" not in tree(tmp_path).values()


def test_after_a_wrong_download_the_right_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        server.files[TEST] = b"another file"
        refusal(lambda: data.load("mnist", tmp_path))
        server.files[TEST] = made.files[TEST]
        test = data.load("mnist", tmp_path).test
    np.testing.assert_array_equal(test, made.arrays["test"])


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
def test_a_file_that_is_not_published_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with serving(monkeypatch, "mnist") as (server, _):
        server.files.clear()
        server.status = status
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert message == f"{needs_mnist(tmp_path)}; 127.0.0.1 answers {status} for {server.url}{TRAIN}"
    assert server.asked == [TRAIN]
    assert tree(tmp_path) == {}


def test_a_later_file_that_is_not_published_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        del server.files[TEST_LABELS]
        server.last = TEST_LABELS
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
        needs = needs_mnist(tmp_path).removeprefix("dataset 'mnist' needs ")
        reason = f"Failed to get url {server.url}{TEST_LABELS}. HTTP code: 404."
        assert message == f"the download failed ({reason}): put {needs}"
        assert not (tmp_path / "mnist").exists()
        server.files[TEST_LABELS], server.last = made.files[TEST_LABELS], ""
        labels = data.load("mnist", tmp_path).test_labels
    np.testing.assert_array_equal(labels, made.arrays["test_labels"])


def test_a_download_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "downloads").touch()
    with serving(monkeypatch, "mnist"):
        message = refusal(lambda: data.load("mnist", tmp_path))
    assert message.startswith("the download failed (")
    assert f"{tmp_path / 'downloads'}" in message
    assert tree(tmp_path) == {"downloads": b""}


def test_what_has_no_checksum_is_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "omniglot") as (server, _):
        message = refusal(lambda: data.load("omniglot", tmp_path), data.NoNetworkError)
    assert server.asked == []
    assert message == (
        f"dataset 'omniglot' needs chardata.mat in {tmp_path}/downloads/manual or "
        f"{tmp_path}/omniglot; nobody published a checksum of chardata.mat, so that it is not "
        f"downloaded: it is at {server.url}chardata.mat"
    )
    assert tree(tmp_path) == {}


def test_no_network_is_an_error_of_the_data() -> None:
    """Who catches the one catches the other."""
    assert issubclass(data.NoNetworkError, data.DataError)
