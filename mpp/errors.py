"""Errors that the user can put right: one clear line, printed without a traceback and without secrets in addresses."""

import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something asked for cannot be done; the text names the thing, the value and what to do next."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting that cannot be used: one line that names the file or flag, the value and what is accepted."""


class RunError(UserError):
    """A run that had started had to stop; the text says why and where it can go on."""

    exit_code = 1


class TryLater(UserError):
    """A run that waits for a remote store to answer; the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL


class Stopped(UserError):
    """A run, called from Python, that was asked to stop and has saved itself; the same call goes on with it."""

    exit_code = 75


class Unreachable(OSError):
    """A remote store gives no answer, after several tries: no fault of the images."""


def command(tool: str) -> str:
    """How to start another tool, as this one was: `python tools/shard.py` from a clone, else `mpp shard`."""
    sibling = Path(sys.argv[0]).with_name(f"{tool}.py") if sys.argv and sys.argv[0].endswith(".py") else Path(tool)
    if sibling.parent.name == "tools" and sibling.is_file():
        return f"python {shlex.quote(str(sibling))}"
    return f"mpp {tool.replace('_', '-')}"


def install(extra: str) -> str:
    """The pip command that installs an optional extra, such as "hf", for the Python that runs this.

    It names the packages one by one: "mpp" is another project on PyPI, which `pip install "mpp[hf]"` would fetch.
    """
    try:
        known = requires("mpp") or []
    except PackageNotFoundError:  # its source is on sys.path, not installed
        known = []
    packages = re.findall(rf"^(.+?) *; *extra == [\"']{extra}[\"']$", "\n".join(known), re.MULTILINE)
    packages = packages or ["-e", f"{Path(__file__).parent.parent}[{extra}]"]
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.join(packages)}"


_ADDRESS = re.compile(r"(\w+)://(?:[^\s/?#'\"]*@)?([^\s?#'\"]*)([?][^\s'\"]*)?")

# Parameters that sign an address: of S3, Google, Azure, Alibaba, Tencent, CloudFront, Akamai and others.
_SIGNATURE = re.compile(
    r"x-(amz|goog|oss|cos|obs|ms)-.*|awsaccesskeyid|ossaccesskeyid|googleaccessid|key-pair-id|keyname|urlprefix|policy"
    r"|hash-algorithm|signature|sig|hmac|expires|expiry|q-(ak|header-list|url-param-list|sign.*|key-time)"
    r"|((access|auth|session|id)[_-]?)?token|__token__|hdnts|hdnea|__gda__|api[_-]?key",
    re.IGNORECASE,
)
# Azure's others, too short to go by their names alone; `sig` is always with them.
_AZURE = re.compile("s[vstrpei]|srt|sip|spr|sk(oid|tid|t|e|s|v)|saoid|suoid|scid|sdd|ses|rsc[cdelt]")


def split_query(url: str) -> tuple[str, str]:
    """Splits an http address into the part that names the object and the parameters that sign it, joined by &.

    A signature changes from day to day; any other parameter may name another object. User names and passwords are in
    neither part.
    """
    address, _, query = url.partition("?")
    parameters = [parameter for parameter in query.split("&") if parameter]
    names = [parameter.partition("=")[0].lower() for parameter in parameters]
    signs = [bool(_SIGNATURE.fullmatch(name) or ("sig" in names and _AZURE.fullmatch(name))) for name in names]
    naming, signing = (
        "&".join(parameter for parameter, sign in zip(parameters, signs, strict=True) if sign == wanted)
        for wanted in (False, True)
    )
    address = without_credentials(address)
    return f"{address}?{naming}" if naming else address, signing


def without_credentials(value: Any) -> Any:
    """A text, or plain nested values, without user names, passwords and http queries (maybe signed) in their URLs."""
    if isinstance(value, Mapping):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return _ADDRESS.sub(_bare, value) if isinstance(value, str) else value


def _bare(found: re.Match[str]) -> str:
    query = "" if found[1].lower().startswith("http") else found[3] or ""
    return f"{found[1]}://{found[2]}{query}"
