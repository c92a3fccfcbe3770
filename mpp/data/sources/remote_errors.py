"""Failed requests: an answer that stays, one that may pass, or none, by the errors of whichever library asked.

https: aiohttp; s3: botocore, or what s3fs makes of it; gs: gcsfs and google.auth; hf: huggingface_hub over httpx.
Which of them are installed is the user's choice, so their classes go by name.
"""

import json
import re
from collections.abc import Iterator

from mpp.data.sources.patterns import shown

_STAYS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_MISTAKES = (ImportError, TypeError, ValueError, NotImplementedError)
_MAY_PASS = frozenset((408, 425, 429))
_NEVER = frozenset((501, 505, 506, 508, 510, 511))  # of 500 and above
_AWAY = frozenset((408, 429, 502, 503, 504, *range(520, 531)))  # above 520: Cloudflare, before a server that is down
_MISSING = frozenset((404, 410))
_FORBIDDEN = frozenset((401, 403, 407))
_LATER = re.compile(r"RequestTimeout|PriorRequestNotComplete|OperationAborted|SlowDown|Throttl")  # codes of S3
_RATE = re.compile(r"rate.?limit", re.IGNORECASE)  # Google answers so with 403, too

_SETTLED = re.compile(
    "RangeNotSupported|ServerFingerprintMismatch|TooManyRedirects|UnsupportedProtocol|LocalProtocolError|InvalidURL"
    "|OfflineModeIsEnabled|LocalTokenNotFoundError|EntryNotFoundError|NonRetryableError|BotoCoreError|GoogleAuthError"
)
"""Bases of errors without a status that stay: of an address, of settings, of credentials."""
_UNSETTLED = re.compile(
    "HTTPClientError|ConnectionError|IncompleteReadError|MetadataRetrievalError|CredentialRetrievalError"
    "|TokenRetrievalError|ChecksumError|FlexibleChecksumError|CapacityNotAvailableError"
    "|TransportError|ResponseError|TimeoutError"
)
"""Of those, bases of the ones that are only about the network."""


class RangeNotSupported(OSError):
    """A server that sends whole files only."""


def kind_of_failure(error: Exception) -> type[OSError] | None:
    """FileNotFoundError or another error for good where the answer says so; None: any other."""
    status = http_status(error)
    if status in _FORBIDDEN and not may_pass(error):
        return PermissionError
    if status in _MISSING:
        return FileNotFoundError
    return next((kind for kind in _STAYS if isinstance(error, kind)), None)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a while."""
    if isinstance(error, TimeoutError) or _later(error):
        return True
    status = http_status(error)
    if status:
        return status in _MAY_PASS or (status >= 500 and status not in _NEVER)
    if isinstance(error, json.JSONDecodeError):  # an answer that was cut off
        return True
    if isinstance(error, (*_STAYS, *_MISTAKES)) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if getattr(error, "retryable", False):  # google.auth's
        return True
    first, *rest = map(_settled, _causes(error))
    return not first or False in rest


def is_away(error: Exception) -> bool:
    """Whether the server gives no answer, rather than one about this file."""
    if not may_pass(error):
        return False
    status = http_status(error)
    return isinstance(error, TimeoutError) or _later(error) or not status or status in _AWAY


def http_status(error: Exception) -> int:
    """The HTTP status that an error or one of its causes carries; 0 where none does."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # aiohttp's, httpx's and huggingface_hub's, gcsfs's
            status = getattr(cause, "status", 0) or getattr(response, "status_code", 0) or getattr(cause, "code", 0)
        if isinstance(status, int | str) and re.fullmatch("[345][0-9][0-9]", str(status)):
            return int(status)
        if type(cause) is OSError and str(cause).startswith("Forbidden: "):  # gcsfs's
            return 403
    return 0


def reason(error: Exception, limit: float | None) -> str:
    """Why a request that could take `limit` seconds failed, in one line without credentials."""
    status = http_status(error)
    if isinstance(error, TimeoutError):
        return f"no answer within {limit:.3g} s" if limit else "no answer in time"
    if kind_of_failure(error) is FileNotFoundError:
        return "is not there"
    if status and hasattr(error, "message") and hasattr(error, "request_info"):  # aiohttp's, whose text has the URL
        return f"HTTP status {status} {error.message}".strip()  # pyright: ignore[reportAttributeAccessIssue]
    text = shown(" ".join(str(error).split()))[:300] or type(error).__name__
    return f"HTTP status {status}: {text}" if status and str(status) not in text else text


def _later(error: Exception) -> bool:
    """Whether a store asks for patience by a status that says otherwise."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and _LATER.search(str(response.get("Error", {}).get("Code"))):
            return True
    return http_status(error) == 403 and bool(_RATE.search(str(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _settled(error: BaseException) -> bool | None:
    """Whether an error of this class stays, by the nearest of its bases that is known; None where none is."""
    for kind in type(error).__mro__:
        if _SETTLED.fullmatch(kind.__name__):
            return True
        if _UNSETTLED.fullmatch(kind.__name__):
            return False
    return None
