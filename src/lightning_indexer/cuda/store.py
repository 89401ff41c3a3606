"""Compiled kernels on disk, found by what they were made from.

An entry is a folder named by its key, a hash over everything that the binary depends on and nothing else (no path, no
time):

    <cache folder>/kernels/<key>/kernel.cubin     the binary
                                 meta.json        its hash, and what the compiler said about it

An entry is written beside its place and renamed into it, so that a reader sees a whole entry or none, whatever other
processes do. Two processes that build the same entry publish the same thing; one of them wins.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1  # of an entry: older ones are simply not found any more
_BINARY, _META = "kernel.cubin", "meta.json"


def content_key(parts: Iterable[str | bytes]) -> str:
    """Hash of the parts in order. Each is preceded by its length, so that no two lists run into one another."""
    digest = hashlib.sha256()
    for part in (str(FORMAT_VERSION), *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Store:
    """Entries below one folder.

    Args:
        folder: made on the first write; deleting it, or anything in it, costs a rebuild.
    """

    folder: Path

    def read(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The binary and its facts; None where there is none, or (with a warning) where it is damaged."""
        place = self._place(key)
        try:
            return _read_entry(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if place.exists():
                warnings.warn(f"damaged kernel cache entry {place}: {error}; building it again", stacklevel=2)
        return None

    def write(self, key: str, binary: bytes, facts: dict[str, Any]) -> None:
        """Publish an entry, in the place of a damaged one if there is one. Warns where the folder cannot be written."""
        try:
            self._publish(key, binary, facts)
        except OSError as error:
            warnings.warn(
                f"cannot keep compiled kernels in {self.folder}: {error}; they will be compiled again next time "
                "(set LIGHTNING_INDEXER_CACHE to a folder that can be written)",
                stacklevel=2,
            )

    def usage(self) -> tuple[int, int]:
        """Entries, and their bytes."""
        entries = [entry for entry in (self.folder / "kernels").glob("[!.]*") if entry.is_dir()]
        sizes = [file.stat().st_size for entry in entries for file in entry.iterdir()]
        return len(entries), sum(sizes)

    def check_writable(self) -> None:
        """Raise OSError where entries could not be kept."""
        folder = self.folder / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def _publish(self, key: str, binary: bytes, facts: dict[str, Any]) -> None:
        place = self._place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".staging-", ignore_cleanup_errors=True) as staging:
            entry = Path(staging) / "entry"
            entry.mkdir()
            meta = {"checksum": _checksum(binary, facts), "facts": facts}
            _write_durably(entry / _BINARY, binary)
            _write_durably(entry / _META, json.dumps(meta, indent=2, sort_keys=True).encode())
            _move_into_place(entry, place, Path(staging))

    def _place(self, key: str) -> Path:
        return self.folder / "kernels" / key


def _read_entry(place: Path) -> tuple[bytes, dict[str, Any]]:
    """Raise FileNotFoundError, OSError, ValueError, KeyError or TypeError unless the entry is whole."""
    meta = json.loads((place / _META).read_bytes())
    binary = (place / _BINARY).read_bytes()
    facts = dict(meta["facts"])
    if _checksum(binary, facts) != meta["checksum"]:
        raise ValueError(f"{_BINARY} and {_META} do not belong together")
    return binary, facts


def _checksum(binary: bytes, facts: dict[str, Any]) -> str:
    return content_key([binary, json.dumps(facts, sort_keys=True)])


def _move_into_place(entry: Path, place: Path, staging: Path) -> None:
    """Rename `entry` to `place`, unless a whole entry is there: another process was quicker, and ours is the same."""
    for attempt in range(3):  # each turn is lost only to another process that publishes between two of our steps
        try:
            os.replace(entry, place)
            return
        except OSError as error:
            reason = error
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            _read_entry(place)
            return
        with contextlib.suppress(FileNotFoundError):
            os.replace(place, staging / f"damaged-{attempt}")
    raise reason


def _write_durably(path: Path, data: bytes) -> None:
    """Write and flush to the disk: a rename must not overtake the bytes in a crash."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
