"""Files that could not be decoded: counted, named in the run's folder, and too many of them end the run."""

import csv
from pathlib import Path

from mpp.errors import RunError

_FEW_READ = 1000  # below this many images, the share of bad files is taken of this many


class BadFiles:
    """Counts and names the files that could not be decoded; too many of them end the run.

    Args:
        path: bad_files.csv of the run, read where the run goes on; None writes nothing.
        max_share: of the images read.
        read: images read before this start of the run.
    """

    def __init__(self, path: Path | None, max_share: float, read: int = 0) -> None:
        self._path = path
        self._max_share = max_share
        self._read = read
        self._reasons: dict[int, str] = {}
        if path is not None and path.exists() and read:
            with path.open(newline="") as file:
                self._reasons = {int(row[0]): row[1] for row in csv.reader(file) if len(row) == 2}
        elif path is not None:
            path.unlink(missing_ok=True)

    def add(self, bad: list[tuple[int, str]], images: int) -> None:
        """Notes the bad files met while reading `images` images.

        Raises:
            RunError: past the allowed share.
        """
        self._read += images
        for index, reason in bad:
            if index not in self._reasons:
                self._reasons[index] = reason
                if self._path is not None:
                    with self._path.open("a", newline="") as file:
                        csv.writer(file).writerow([index, reason])
        limit = self._max_share * max(self._read, _FEW_READ)
        if len(self._reasons) > limit:
            index, reason = next(reversed(self._reasons.items()))
            where = f"; all are in {self._path}" if self._path else ""
            raise RunError(
                f"{len(self._reasons)} of the first {self._read} images cannot be decoded, more than data.max_bad "
                f"allows (the last is image {index}: {reason}){where}"
            )

    def __len__(self) -> int:
        return len(self._reasons)
