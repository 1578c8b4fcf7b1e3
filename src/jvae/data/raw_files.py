"""Where raw files are: two places on the disk, then the network."""

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from jvae.data.catalogue import SOURCES, RawFile, Source
from jvae.data.dataset import DataError

# No network is known for that after so many seconds; tensorflow-datasets, whose downloads we do
# not use for it, tries for 204.
CONNECT_SECONDS = 8.0


_EVERY_SHA256 = frozenset(
    digest for source in SOURCES.values() for file in source.files for digest in file.sha256
)


class NoNetworkError(DataError):
    """A file is neither on the disk nor within reach; the message says where to put it."""


def locate(source: Source, data_dir: Path) -> dict[str, Path]:
    """The raw files of a dataset: those on the disk, the rest downloaded.

    Each is looked for in `<data_dir>/downloads/manual/`, where tensorflow-datasets looks, then in
    `<data_dir>/<name>/`, where a download goes too, once its checksum is right.

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
        for file in missing:
            found[file.name] = _download(file, data_dir / source.name, wanted)
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
        # MNIST's kin have files of the same names, and share the first place.
        if digest not in _EVERY_SHA256 or place.name == source.name:
            wrong = wrong or (path, digest)
    if wrong is not None:
        path, digest = wrong
        raise DataError(
            f"{path} has SHA-256 {digest}, {source.name}'s has {' or '.join(file.sha256)}: it is "
            "cut short or another file of the same name; replace it or move it away"
        )
    return None


def _wanted(missing: list[RawFile], places: list[Path]) -> str:
    files = ", ".join(
        f"{file.name} (SHA-256 {file.sha256[0]})" if file.sha256 else file.name for file in missing
    )
    return f"{files} in {' or '.join(map(str, places))}"


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


def _download(file: RawFile, folder: Path, wanted: str) -> Path:
    """Download one file into `folder`, whole and with the right checksum or not at all."""
    import requests

    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{file.name}.{os.getpid()}"
    digest = hashlib.sha256()
    try:
        with (
            requests.get(file.url, stream=True, timeout=CONNECT_SECONDS) as response,
            draft.open("wb") as opened,
        ):
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(None, file.name, size, unit="B", unit_scale=True, disable=None) as bar:
                for block in response.iter_content(1 << 20):
                    digest.update(block)
                    opened.write(block)
                    bar.update(len(block))
        if digest.hexdigest() not in file.sha256:
            raise DataError(
                f"{file.url} gave a file of SHA-256 {digest.hexdigest()}, expected "
                f"{file.sha256[0]}: put {wanted}"
            )
        return draft.rename(folder / file.name)
    except requests.RequestException as error:
        reason = " ".join(str(error).split())
        raise NoNetworkError(f"the download failed ({reason}): put {wanted}") from error
    finally:
        draft.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
