"""Where raw files are: two places on the disk, then the network."""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from jvae.data.catalogue import RawFile, Source
from jvae.data.dataset import DataError

# No network is known for that after so many seconds; tensorflow-datasets tries for 204.
CONNECT_SECONDS = 8.0


class NoNetworkError(DataError):
    """A file is neither on the disk nor within reach; the message says where to put it."""


def locate(source: Source, data_dir: Path) -> dict[str, Path]:
    """The raw files of a dataset: those on the disk, the rest downloaded.

    Each is looked for in `<data_dir>/downloads/manual/`, where tensorflow-datasets looks, then in
    `<data_dir>/<name>/`. A download goes through tensorflow-datasets into
    `<data_dir>/downloads/`, which keeps it only with the right checksum.

    Raises:
      DataError: a file with another checksum than its authors' file.
      NoNetworkError: a file that is not there and cannot be downloaded.
    """
    places = [data_dir / "downloads" / "manual", data_dir / source.name]
    found: dict[str, Path] = {}
    missing: list[RawFile] = []
    for file in source.files:
        path = _on_disk(file, places, source)
        if path is None:
            missing.append(file)
        else:
            found[file.name] = path
    if missing:
        wanted = _wanted(missing, places)
        for file in missing:
            if not file.sha256:
                raise NoNetworkError(
                    f"dataset {source.name!r} needs {wanted}; nobody published a checksum of "
                    f"{file.name}, so that it is not downloaded: it is at {file.url}"
                )
        if (reason := _unreachable(missing[0].url)) is not None:
            raise NoNetworkError(f"dataset {source.name!r} needs {wanted}; {reason}")
        found |= _download(missing, data_dir, wanted)
    return found


def _on_disk(file: RawFile, places: Iterable[Path], source: Source) -> Path | None:
    wrong = None
    for place in places:
        path = place / file.name
        if not path.is_file():
            continue
        if not file.sha256:
            return path
        digest = _sha256(path)
        if digest in file.sha256:
            return path
        wrong = wrong or (path, digest)
    if wrong is not None:
        path, digest = wrong
        raise DataError(
            f"{path} has SHA-256 {digest}, {source.name}'s has {' or '.join(file.sha256)}: it is "
            "cut short or another dataset's file of the same name; replace it or move it away"
        )
    return None


def _wanted(missing: list[RawFile], places: list[Path]) -> str:
    first, *others = missing
    checksum = f" (SHA-256 {first.sha256[0]})" if first.sha256 else ""
    more = f", and {', '.join(file.name for file in others)}," if others else ""
    return f"{first.name}{checksum}{more} in {' or '.join(map(str, places))}"


def _unreachable(url: str) -> str | None:
    """Why `url` cannot be had, None when it can; known within `CONNECT_SECONDS`."""
    import requests

    host = urlsplit(url).hostname
    reason: list[str | None] = []

    def ask() -> None:
        try:
            with requests.get(url, stream=True, timeout=CONNECT_SECONDS) as response:
                code = response.status_code
                reason.append(None if response.ok else f"{host} answers {code} for {url}")
        except requests.RequestException as error:
            reason.append(f"no network: cannot reach {host} ({type(error).__name__})")

    # A name server that does not answer blocks beyond any timeout of the request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return reason[0] if reason else f"no network: {host} does not answer"


def _download(missing: list[RawFile], data_dir: Path, wanted: str) -> dict[str, Path]:
    import tensorflow_datasets as tfds

    try:
        manager = tfds.download.DownloadManager(download_dir=data_dir / "downloads")
        paths = manager.download({file.name: file.url for file in missing})
    except Exception as error:  # of requests, of tensorflow-datasets, of the disk
        reason = str(error).partition("\n")[0]
        raise NoNetworkError(f"the download failed ({reason}): put {wanted}") from error
    found = {name: Path(path) for name, path in paths.items()}
    for file in missing:
        digest = _sha256(found[file.name])
        if digest not in file.sha256:
            found[file.name].unlink()
            raise DataError(
                f"{file.url} gave a file of SHA-256 {digest}, expected {file.sha256[0]}: put "
                f"{wanted}"
            )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
