"""The folder that is packed into: what is there already, and what it becomes in the end.

out/.packing/packing.json                what is packed, and how
out/.packing/000012-000.tar, .index      shards of task 12
out/.packing/000012.json                 its record, written when its shards are complete
->
out/shards-000000.tar, .index ...        the same, numbered
out/classes.txt, bad_files.csv, manifest.json
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpp.curation.packing.tar_writer import TEMPORARY, Part
from mpp.curation.packing.tasks import Record
from mpp.data.sources.names import is_hidden, printable
from mpp.data.sources.tar_index import sidecar_name
from mpp.errors import RunError, UserError
from mpp.system.files import LOCK, one_writer, write_whole

FORMAT = 1
"""Of manifest.json and of the records."""
_WORK, _PACKING, _MANIFEST, _CLASSES, _BAD = ".packing", "packing.json", "manifest.json", "classes.txt", "bad_files.csv"
_OURS = re.compile(rf"{_MANIFEST}|{_CLASSES}|{_BAD}|shards-\d{{6,}}\.tar(\.index)?")


class PackingFolder:
    """The folder of one packing.

    Args:
        out: made where it is missing.
        identity: what is packed and how, in plain values: "source", its "fingerprint", and "settings" by name.

    Raises:
        UserError: other files are in it, or another packing.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self._work, self._identity = out, out / _WORK, identity
        self.bad_files = out / _BAD
        self.manifest: dict[str, Any] | None = None
        """Of a packing that is complete; else None."""
        self._look()

    def _look(self) -> None:
        out = self.out
        try:
            found = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
        except OSError as error:
            reason = f"cannot be listed ({error.strerror})"
            raise UserError(f"--out {out} {reason}; give a new or an empty folder") from error
        earlier = _read_json(out / _MANIFEST) or _read_json(self._work / _PACKING)
        foreign = [name for name in found if not is_hidden(name) and not (earlier and _OURS.fullmatch(name))]
        if foreign:
            what = "which no packing wrote; give a new or an empty folder"
            raise UserError(f"--out {out} holds {printable(foreign[0])}, {what}")
        if earlier is not None:
            self._check_same(earlier)
        self.manifest = _read_json(out / _MANIFEST)

    def _check_same(self, earlier: dict[str, Any]) -> None:
        mine, theirs = self._identity, earlier.get("settings", {})
        differing = [
            f"{key} {json.dumps(theirs.get(key))} there, {json.dumps(value)} here"
            for key, value in mine["settings"].items()
            if theirs.get(key) != value
        ]
        if earlier.get("fingerprint") != mine["fingerprint"]:
            there, here = earlier.get("source"), mine["source"]
            same = f"the images of {here} have changed since"
            differing.insert(0, same if there == here else f"source {there} there, {here} here")
        if differing:
            what = f"{self.out} holds another packing ({'; '.join(differing)})"
            raise UserError(f"--out {what}; give another folder, or remove that one")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, this process alone packs into the folder; what a killed one left unfinished is removed.

        What another one has finished meanwhile is seen.

        Raises:
            UserError: another process is packing there, or another packing is there now; or it cannot be written.
        """
        with one_writer(self.out, "--out", f"{_WORK}/{LOCK}"):
            self._look()
            if self.manifest is None:
                with self._writing():
                    for left in self._work.glob(f"*{TEMPORARY}"):
                        left.unlink(missing_ok=True)
                    _write_synced(self._work / _PACKING, _json(self._identity))
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"cannot be written to ({error.strerror or error})"
            raise UserError(f"--out {self.out} {reason}; give another folder, or mend this one") from error

    @property
    def work(self) -> Path:
        """Where tasks write their shards."""
        return self._work

    def keep(self, task: int, record: Record) -> None:
        """Writes the record of a task whose shards are complete."""
        _write_synced(self._work / f"{task:06d}.json", _json(record.to_dict()))

    def record(self, task: int) -> Record:
        """The record of a task that is done."""
        held = _read_json(self._work / f"{task:06d}.json")
        if held is None:
            raise RunError(f"{self._work / f'{task:06d}.json'} is gone; run the same command again")
        return Record.from_dict(held)

    def done(self, tasks: int) -> set[int]:
        """Which of the tasks need not be done again: those whose record and shards are there, whole by their sizes."""
        parts: dict[int, list[Part]] = {}
        for task in range(tasks):
            held = _read_json(self._work / f"{task:06d}.json")
            if held is not None:
                parts[task] = [Part(*part) for part in held["parts"]]
        numbered = dict(self._numbered(list(parts.values()))) if len(parts) == tasks else {}
        return {
            task
            for task, made in parts.items()
            if all(
                _whole(self._work / part.name, part.bytes)
                or (part.name in numbered and _whole(self.out / numbered[part.name], part.bytes))
                for part in made
            )
        }

    def _numbered(self, tasks: Sequence[Sequence[Part]]) -> list[tuple[str, str]]:
        """Each part's name among the tasks, and in the end."""
        parts = [part.name for made in tasks for part in made]
        return [(part, f"shards-{number:06d}.tar") for number, part in enumerate(parts)]

    def finish(self, tasks: Sequence[Sequence[Part]], classes: Sequence[str] | None, figures: dict[str, Any]) -> None:
        """Numbers the shards and writes manifest.json; where it is interrupted, it can be called again.

        Args:
            tasks: the parts of each task.
            classes: their names, or None.
            figures: what else the manifest says.
        """
        numbered = self._numbered(tasks)
        for part, name in numbered:
            for old, new in ((part, name), (sidecar_name(part), sidecar_name(name))):
                with contextlib.suppress(FileNotFoundError):  # before an interruption
                    os.replace(self._work / old, self.out / new)
        if classes is not None:
            self._publish(_CLASSES, "".join(f"{name}\n" for name in classes).encode())
        made = [part for parts in tasks for part in parts]
        shards = [
            {"name": name, "images": part.images, "bytes": part.bytes, "sha256": part.sha256}
            for part, (_, name) in zip(made, numbered, strict=True)
        ]
        self.manifest = {"format": FORMAT, **self._identity, **figures, "shards": shards}
        self._publish(_MANIFEST, _json(self.manifest, indent=1))

    def _publish(self, name: str, data: bytes) -> None:
        """Writes a file of the result by way of the folder that goes in the end, with all that a kill leaves in it."""
        _write_synced(self._work / name, data)
        os.replace(self._work / name, self.out / name)

    def clean_up(self) -> None:
        """Removes what only an unfinished packing needs."""
        shutil.rmtree(self._work, ignore_errors=True)

    def check_complete(self) -> None:
        """That the shards of a finished packing are there with their sizes.

        Raises:
            RunError: one is not.
        """
        assert self.manifest is not None
        for shard in self.manifest["shards"]:
            if not _whole(self.out / shard["name"], shard["bytes"]):
                what = f"is missing or has not the {shard['bytes']:,} bytes that {_MANIFEST} says"
                raise RunError(f"{self.out / shard['name']} {what}; remove {self.out} and pack again")


def _whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where it is missing, or damaged by a crash of the machine."""
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and held.get("format") == FORMAT else None


def _json(held: dict[str, Any], indent: int | None = None) -> bytes:
    return (
        json.dumps({"format": FORMAT, **held}, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
        + b"\n"
    )


def _write_synced(path: Path, data: bytes) -> None:
    write_whole(path, lambda file: (file.write(data), file.flush(), os.fsync(file.fileno())))
