"""The command that says what lies in the cache, and clears it."""

import time
from collections.abc import Sequence

from mpp.errors import ConfigError, RunError
from mpp.system.cache import KINDS, LIMIT, clear, entries, limit_of, parse_limit, shown_size
from mpp.system.files import cache_folder

ALL = "all"


def cache(kinds: Sequence[str], limit: str, files: bool) -> int:
    """Removes what is asked for, says what is left, and returns the exit status.

    Args:
        kinds: of KINDS, or "all": what to remove.
        limit: remove only until the whole cache has no more; of all kinds where none is given.
        files: say the path of each file.

    Raises:
        ConfigError: a kind or a size that there is not.
        RunError: the cache cannot be cleared.
    """
    folder = cache_folder()
    wrong = [kind for kind in kinds if kind not in KINDS and kind != ALL]
    if wrong:
        raise ConfigError(f"--clear {wrong[0]!r}: the kinds are {', '.join(KINDS)}; {ALL} is every one")
    most = parse_limit(limit, folder, "--limit") if limit else 0
    if kinds or limit:
        try:
            removed = clear(KINDS if ALL in kinds or not kinds else kinds, most) if most is not None else []
        except OSError as error:
            raise RunError(f"cannot clear the cache {folder}: {error.strerror}") from error
        print(f"removed {len(removed):,} entries, {shown_size(sum(entry.size for entry in removed))}")
    held = entries(folder)
    allowed = limit_of(folder)
    of = "without a limit" if allowed is None else f"of at most {shown_size(allowed)}"
    total = shown_size(sum(entry.size for entry in held))
    print(f"{folder}: {total}, {of} (MPP_CACHE_LIMIT, by default {LIMIT} of the disk)")
    for kind, what in KINDS.items():
        found = [entry for entry in held if entry.kind == kind]
        if found:
            size, busy = shown_size(sum(entry.size for entry in found)), sum(entry.busy for entry in found)
            since = f"{_day(found[0].used)} to {_day(found[-1].used)}"
            in_use = f", {busy:,} in use" if busy else ""
            print(f"  {kind:10} {size:>10}  {len(found):>6,} used {since}{in_use}: {what}")
            for path in (path for entry in found for path in entry.paths) if files else ():
                print(f"    {path}")
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
