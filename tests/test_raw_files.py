import contextlib
import dataclasses
import http.server
import re
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
from tiny_sources import (
    NAMES,
    NOWHERE,
    Tiny,
    enter,
    install,
    refusal,
    sha256,
    tiny,
    tree,
    with_files,
)

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


def test_files_of_another_dataset_in_the_place_of_all_are_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the labels, which of these tiny ones are the same files."""
    install(monkeypatch, "fashion_mnist", tmp_path / "downloads" / "manual")
    enter(monkeypatch, tiny("mnist").source)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert message == (
        f"dataset 'mnist' needs {wanted('mnist', tmp_path, TRAIN, TEST)}; no network: cannot reach "
        "127.0.0.1 (ConnectionError)"
    )
    assert tree(tmp_path) == before


def test_files_of_another_dataset_in_the_place_of_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download would overwrite them."""
    install(monkeypatch, "fashion_mnist", tmp_path / "mnist")
    enter(monkeypatch, tiny("mnist").source)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path))
    assert message.startswith(f"{tmp_path / 'mnist' / TRAIN} has SHA-256 ")
    assert message.endswith("another file of the same name; replace it or move it away")
    assert tree(tmp_path) == before


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
        f"{sha256(made.files[TEST])}: it is cut short or another file of the same name; "
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
        # Without that word there is a page in front of a large file.
        url = file.url.replace("confirm=t&", "")
        assert (url != file.url) == (name == "celeb_a")
        assert published[url].checksum == file.sha256[0]
        assert published[url].filename == file.name


@pytest.mark.parametrize("name", NAMES)
def test_checksums_are_hexadecimal(name: str) -> None:
    files = SOURCES[name].files
    digests = [digest for file in files for digest in file.sha256]
    digests += filter(None, [SOURCES[name].content_sha256])
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
    enter(monkeypatch, source)
    return dataclasses.replace(made, source=source)


def wanted(name: str, data_dir: Path, *files: str) -> str:
    """What the message says of missing files, which are all where none is given."""
    content = tiny(name).files
    listed = ", ".join(f"{file} (SHA-256 {sha256(content[file])})" for file in files or content)
    return f"{listed} in {data_dir}/downloads/manual or {data_dir}/{name}"


def needs_mnist(data_dir: Path) -> str:
    """How the message begins where no file of MNIST is there."""
    return f"dataset 'mnist' needs {wanted('mnist', data_dir)}"


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
def test_every_refusal_names_all_files_and_their_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(SOURCES, name, tiny(name).source)
    message = refusal(lambda: data.load(name, tmp_path / "new"), data.NoNetworkError)
    assert message == (
        f"dataset {name!r} needs {wanted(name, tmp_path / 'new')}; no network: cannot reach "
        "127.0.0.1 (ConnectionError)"
    )
    assert not (tmp_path / "new").exists()


def test_only_the_files_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    for file in (TRAIN_LABELS, TEST):
        (tmp_path / "mnist" / file).unlink()
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
    assert message == (
        f"dataset 'mnist' needs {wanted('mnist', tmp_path, TRAIN_LABELS, TEST)}; no network: "
        "cannot reach 127.0.0.1 (ConnectionError)"
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
      asked: the names that were asked for, in that order.
      cut: a name of whose content the second half is not sent.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.status, self.cut = dict(files), 404, ""
        self.asked = list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        self.server.asked.append(name)
        content = self.server.files.get(name)
        self.send_response(self.server.status if content is None else 200)
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if name == self.server.cut:
            content = content[: len(content) // 2]
        # Who only asks whether it is there hangs up before the end.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

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


def folder_of(name: str, files: dict[str, bytes]) -> dict[str, bytes | None]:
    """The tree that holds nothing but these files of a dataset."""
    return {name: None, **{f"{name}/{file}": content for file, content in files.items()}}


@pytest.mark.parametrize("name", WITH_CHECKSUM)
def test_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with serving(monkeypatch, name) as (server, made):
        first = locate(name, tmp_path)
        # The first is asked for twice: whether it is there, and for its content.
        assert server.asked == [next(iter(made.files)), *made.files]
        server.asked.clear()
        assert tree(tmp_path) == folder_of(name, made.files)
        assert first == locate(name, tmp_path)
        assert first == {file: tmp_path / name / file for file in made.files}
        dataset = data.load(name, tmp_path)
    assert server.asked == []
    for array, expected in made.arrays.items():
        np.testing.assert_array_equal(getattr(dataset, array), expected)
    assert dataset.source == f"raw files in {tmp_path / name}"


@pytest.mark.parametrize("missing", [[TEST], [TRAIN_LABELS, TEST_LABELS]])
def test_only_what_is_missing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    manual = tmp_path / "downloads" / "manual"
    with serving(monkeypatch, "mnist") as (server, made):
        made.write(manual)
        for file in missing:
            (manual / file).unlink()
        dataset = data.load("mnist", tmp_path)
    assert server.asked == [missing[0], *missing]
    for array, expected in made.arrays.items():
        np.testing.assert_array_equal(getattr(dataset, array), expected)
    assert dataset.source == f"raw files in {manual}, {tmp_path / 'mnist'}"
    assert {path.name for path in manual.iterdir()} == set(made.files).difference(missing)
    kept = {path.name for path in (tmp_path / "mnist").iterdir() if path.is_file()}
    assert kept == set(missing)


def test_what_is_another_datasets_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manual = tmp_path / "downloads" / "manual"
    install(monkeypatch, "fashion_mnist", manual)
    before = tree(manual)
    with serving(monkeypatch, "mnist") as (server, made):
        train = data.load("mnist", tmp_path).train
    np.testing.assert_array_equal(train, made.arrays["train"])
    assert server.asked == [TRAIN, TRAIN, TEST]
    assert tree(manual) == before


BEFORE_TEST = {file: tiny("mnist").files[file] for file in (TRAIN, TRAIN_LABELS)}


def test_a_wrong_download_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        server.files[TEST] = b"another file"
        message = refusal(lambda: data.load("mnist", tmp_path))
        assert message == (
            f"{server.url}{TEST} gave a file of SHA-256 {sha256(b'another file')}, expected "
            f"{sha256(made.files[TEST])}: put {wanted('mnist', tmp_path)}"
        )
        assert tree(tmp_path) == folder_of("mnist", BEFORE_TEST)
        assert_the_rest_is_downloaded(tmp_path, server, made)


def assert_the_rest_is_downloaded(data_dir: Path, server: Server, made: Tiny) -> None:
    """What came before the failure stays, and the rest comes now."""
    server.files, server.cut = dict(made.files), ""
    server.asked.clear()
    assert set(locate("mnist", data_dir)) == made.files.keys()
    assert server.asked == [TEST, TEST, TEST_LABELS]
    assert tree(data_dir) == folder_of("mnist", made.files)


def test_one_of_several_checksums_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, "mnist") as (_, made):
        first, *others = made.source.files
        either = first._replace(sha256=("0" * 64, *first.sha256))
        enter(monkeypatch, dataclasses.replace(made.source, files=(either, *others)))
        assert set(locate("mnist", tmp_path)) == made.files.keys()


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
        del server.files[TEST]
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
        reason = f"404 Client Error: Not Found for url: {server.url}{TEST}"
        assert message == f"the download failed ({reason}): put {wanted('mnist', tmp_path)}"
        assert tree(tmp_path) == folder_of("mnist", BEFORE_TEST)
        assert_the_rest_is_downloaded(tmp_path, server, made)


def test_a_connection_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, "mnist") as (server, made):
        server.cut = TEST
        message = refusal(lambda: data.load("mnist", tmp_path), data.NoNetworkError)
        needs = re.escape(wanted("mnist", tmp_path))
        assert re.fullmatch(
            rf"the download failed \(.*IncompleteRead\(.*\)\): put {needs}", message
        )
        assert tree(tmp_path) == folder_of("mnist", BEFORE_TEST)
        assert_the_rest_is_downloaded(tmp_path, server, made)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            requests.ConnectionError("cut\n  off"),
            data.NoNetworkError,
            "the download failed (cut off): put {wanted}",
        ),
        (
            OSError(28, "No space left on device"),
            data.DataError,
            "dataset 'mnist' in {data_dir}: [Errno 28] No space left on device",
        ),
        (RuntimeError("of no kind"), RuntimeError, "of no kind"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_download_that_is_interrupted_leaves_no_draft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    whole = requests.Response.iter_content
    drafts: list[Path] = []

    def interrupted(response: requests.Response, *args: Any) -> Iterator[bytes]:
        if not response.url.endswith(TEST):
            yield from whole(response, *args)
            return
        yield b"half a file"
        finished = [tmp_path / "mnist" / file for file in BEFORE_TEST]
        drafts.extend(set((tmp_path / "mnist").iterdir()).difference(finished))
        raise error

    with serving(monkeypatch, "mnist") as (server, made):
        with monkeypatch.context() as patch:
            patch.setattr(requests.Response, "iter_content", interrupted)
            with pytest.raises(raised) as found:
                data.load("mnist", tmp_path)
        assert type(found.value) is raised
        needs = wanted("mnist", tmp_path)
        assert str(found.value) == message.format(data_dir=tmp_path, wanted=needs)
        assert len(drafts) == 1
        assert tree(tmp_path) == folder_of("mnist", BEFORE_TEST)
        assert_the_rest_is_downloaded(tmp_path, server, made)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only")])
def test_a_download_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    whole = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            raise error
        return whole(path, mode, *args, **kwargs)

    with serving(monkeypatch, "mnist") as (server, _):
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(data.DataError) as found:
            data.load("mnist", tmp_path)
    assert type(found.value) is data.DataError
    assert str(found.value) == f"dataset 'mnist' in {tmp_path}: {error}"
    assert server.asked == [TRAIN, TRAIN]
    assert tree(tmp_path) == {"mnist": None}


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
