"""The command that lists the cache, and clears it."""

import time

from mpp.curation.settings import CacheRecipe
from mpp.errors import ConfigError, RunError
from mpp.system.cache import KINDS, LIMIT, clear, entries, limit_of, parse_limit, shown_size
from mpp.system.files import cache_folder

_ALL = "all"


def cache(config: CacheRecipe) -> int:
    """Removes what is asked for, lists what is left, and returns the exit status; raises ConfigError, RunError."""
    folder, kinds = cache_folder(), config.clear
    wrong = [kind for kind in kinds if kind not in KINDS and kind != _ALL]
    if wrong:
        raise ConfigError(f"--clear {wrong[0]!r}: the kinds are {', '.join(KINDS)}; {_ALL} is every one")
    most = parse_limit(config.limit, folder, "--limit") if config.limit else 0
    if kinds or config.limit:
        try:
            removed = clear(KINDS if _ALL in kinds or not kinds else kinds, most) if most is not None else []
        except OSError as error:
            raise RunError(f"cannot clear the cache {folder}: {error.strerror}") from error
        print(f"removed {len(removed):,} entries, {shown_size(sum(entry.size for entry in removed))}")
    left, allowed = entries(folder), limit_of(folder)
    of = "without a limit" if allowed is None else f"of at most {shown_size(allowed)}"
    total = shown_size(sum(entry.size for entry in left))
    print(f"{folder}: {total}, {of} (MPP_CACHE_LIMIT, by default {LIMIT} of the disk)")
    for kind, what in KINDS.items():
        found = [entry for entry in left if entry.kind == kind]
        if found:
            size, busy = shown_size(sum(entry.size for entry in found)), sum(entry.busy for entry in found)
            first, last = (time.strftime("%Y-%m-%d", time.localtime(entry.used)) for entry in (found[0], found[-1]))
            in_use = f", {busy:,} in use" if busy else ""
            print(f"  {kind:10} {size:>10}  {len(found):>6,} used {first} to {last}{in_use}: {what}")
            for path in (path for entry in found for path in entry.paths) if config.files else ():
                print(f"    {path}")
    return 0
