"""The folder of the shards: what is there already, and what it becomes in the end.

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

from mpp.curation.pack_task import TEMPORARY, Record, Shard
from mpp.data.sources.names import is_hidden, printable
from mpp.data.sources.tar_index import sidecar_name
from mpp.errors import RunError, UserError
from mpp.system.files import LOCK, one_writer, write_whole

_FORMAT = 1  # of manifest.json and of the records
_MANIFEST, _CLASSES, _BAD = "manifest.json", "classes.txt", "bad_files.csv"
_NUMBERED = "shards-{:06d}.tar"
_OURS = re.compile(rf"{_MANIFEST}|{_CLASSES}|{_BAD}|shards-\d{{6,}}\.tar(\.index)?")


class PackingFolder:
    """The folder `out` of one packing, made where it is missing; raises UserError where it holds something else.

    `identity` is what is packed and how, in plain values: "source", its "fingerprint", and "settings" by name.

    Attributes:
        work: where tasks write their shards.
        manifest: of a packing that is complete; else None.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.work, self._identity = out, out / ".packing", identity
        self.bad_files = out / _BAD
        self.manifest: dict[str, Any] | None
        self._look()

    def _look(self) -> None:
        out = self.out
        try:
            found = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
        except OSError as error:
            reason = f"cannot be listed ({error.strerror})"
            raise UserError(f"--out {out} {reason}; give a new or an empty folder") from error
        self.manifest = _read_json(out / _MANIFEST)
        earlier = self.manifest or _read_json(self.work / "packing.json")
        foreign = [name for name in found if not is_hidden(name) and not (earlier and _OURS.fullmatch(name))]
        if foreign:
            what = "which no packing wrote; give a new or an empty folder"
            raise UserError(f"--out {out} holds {printable(foreign[0])}, {what}")
        if earlier is not None:
            self._check_same(earlier)

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
        """Lets this process alone pack into the folder, and removes the unfinished files of a killed one.

        Raises UserError where another process packs there, another packing is there now, or it cannot be written.
        """
        with one_writer(self.out, "--out", f"{self.work.name}/{LOCK}"):
            self._look()  # another process may have finished it
            if self.manifest is None:
                try:
                    for left in self.work.glob(f"*{TEMPORARY}"):
                        left.unlink(missing_ok=True)
                    write_whole(self.work / "packing.json", _json(self._identity), sync=True)
                except OSError as error:
                    reason = f"cannot be written to ({error.strerror or error})"
                    raise UserError(f"--out {self.out} {reason}; give another folder, or mend this one") from error
            yield

    def save(self, task: int, record: Record) -> None:
        """Writes the record of a task whose shards are complete."""
        write_whole(self.work / f"{task:06d}.json", _json(record.to_dict()), sync=True)

    def record(self, task: int) -> Record:
        """The record of a task that is done."""
        record = _read_json(self.work / f"{task:06d}.json")
        if record is None:
            raise RunError(f"{self.work / f'{task:06d}.json'} is gone; run the same command again")
        return Record.from_dict(record)

    def done(self, tasks: int) -> set[int]:
        """Which of the tasks need not be done again: their record is there, and their shards by their sizes."""
        found: dict[int, list[Shard]] = {}
        for task in range(tasks):
            record = _read_json(self.work / f"{task:06d}.json")
            if record is not None:
                found[task] = [Shard(*shard) for shard in record["parts"]]
        every = [shard for shards in found.values() for shard in shards] if len(found) == tasks else []
        final = {shard.name: self.out / _NUMBERED.format(number) for number, shard in enumerate(every)}

        def is_there(shard: Shard) -> bool:
            locations = [self.work / shard.name, final.get(shard.name)]
            return any(path is not None and _is_whole(path, shard.bytes) for path in locations)

        return {task for task, shards in found.items() if all(map(is_there, shards))}

    def finish(self, shards: Sequence[Shard], classes: Sequence[str] | None, figures: dict[str, Any]) -> None:
        """Numbers the shards of all tasks and writes manifest.json with the `figures`; may be called again."""
        for number, shard in enumerate(shards):
            name = _NUMBERED.format(number)
            for old, new in ((shard.name, name), (sidecar_name(shard.name), sidecar_name(name))):
                with contextlib.suppress(FileNotFoundError):  # before an interruption
                    os.replace(self.work / old, self.out / new)
        if classes is not None:
            self._publish(_CLASSES, "".join(f"{name}\n" for name in classes).encode())
        numbered = [{**shard._asdict(), "name": _NUMBERED.format(number)} for number, shard in enumerate(shards)]
        self.manifest = {"format": _FORMAT, **self._identity, **figures, "shards": numbered}
        self._publish(_MANIFEST, _json(self.manifest, indent=1))

    def _publish(self, name: str, data: bytes) -> None:
        """Writes a file of the result by way of `work`, which is removed with all that a kill leaves in it."""
        write_whole(self.work / name, data, sync=True)
        os.replace(self.work / name, self.out / name)

    def clean_up(self) -> None:
        """Removes what only an unfinished packing needs."""
        shutil.rmtree(self.work, ignore_errors=True)

    def check_complete(self) -> None:
        """Checks that the shards of a finished packing are there with their sizes. Raises RunError."""
        assert self.manifest is not None
        for shard in self.manifest["shards"]:
            if not _is_whole(self.out / shard["name"], shard["bytes"]):
                what = f"is missing or has not the {shard['bytes']:,} bytes that {_MANIFEST} says"
                raise RunError(f"{self.out / shard['name']} {what}; remove {self.out} and pack again")


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where it is missing, or damaged by a crash of the machine."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None


def _json(content: dict[str, Any], indent: int | None = None) -> bytes:
    text = json.dumps({"format": _FORMAT, **content}, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"
