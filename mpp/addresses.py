"""Addresses as they may be printed and written down."""

import re

_ADDRESS = re.compile(r"(\w+)://(?:[^\s/?#'\"]*@)?([^\s?#'\"]*)([?][^\s'\"]*)?")


def without_credentials(text: str) -> str:
    """The text with no user names and passwords in its URLs, and no queries, which may be signed, in those of http."""

    def bare(found: re.Match[str]) -> str:
        query = "" if found[1].lower().startswith("http") else found[3] or ""
        return f"{found[1]}://{found[2]}{query}"

    return _ADDRESS.sub(bare, text)
