"""Which answers of which store stay, which may pass, and which are none: by the errors that each library raises."""

import importlib
import ssl

import pytest

from mpp.data.sources import answers
from mpp.errors import Unreachable

STAYS, PASSES, AWAY = "stays", "passes", "away"

BY_STATUS = {
    STAYS: (301, 302, 304, 400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 412, 416, 451, 501, 505, 511),
    PASSES: (425, 500, 507, 509, 599),
    AWAY: (408, 429, 502, 503, 504, 520, 521, 522, 530),
}
STATUSES = [(status, verdict) for verdict, statuses in BY_STATUS.items() for status in statuses]


def verdict(error):
    assert not (answers.is_away(error) and not answers.may_pass(error))
    assert "\n" not in answers.reason(error, 30)
    return AWAY if answers.is_away(error) else PASSES if answers.may_pass(error) else STAYS


def check(error, status, expected):
    assert answers.http_status(error) == status
    assert verdict(error) == expected
    kinds = dict.fromkeys((401, 403, 407), PermissionError) | dict.fromkeys((404, 410), FileNotFoundError)
    if not isinstance(error, PermissionError):
        assert answers.kind_of_failure(error) is kinds.get(status)


@pytest.mark.parametrize(("status", "expected"), STATUSES)
def test_https(status, expected):
    aiohttp = pytest.importorskip("aiohttp")
    request = aiohttp.RequestInfo("https://h/a.tar", "GET", {}, "https://h/a.tar")
    check(aiohttp.ClientResponseError(request, (), status=status, message="Why"), status, expected)


def test_https_without_an_answer():
    client = pytest.importorskip("aiohttp.client_exceptions")
    host = importlib.import_module("aiohttp.client_reqrep").ConnectionKey("h", 443, True, True, None, None, None)
    away = [
        client.ServerDisconnectedError(),
        client.ClientPayloadError("cut"),
        client.ClientConnectorError(host, OSError(111, "refused")),
        client.ConnectionTimeoutError("slow"),
        client.ClientOSError(104, "reset"),
        TimeoutError(),
    ]
    assert {verdict(error) for error in away} == {AWAY}
    certificate = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    stays = [client.InvalidURL("h"), client.ClientConnectorCertificateError(host, certificate)]
    stays += [answers.RangeNotSupported("whole files only"), FileNotFoundError("a"), ImportError("s3fs")]
    assert {verdict(error) for error in stays} == {STAYS}


def boto(status, code):
    exceptions = pytest.importorskip("botocore.exceptions")
    told = {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return exceptions.ClientError(told, "GetObject")


@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize(("status", "expected"), STATUSES)
def test_s3_by_status(status, expected, translated):
    error = boto(status, "Unheard")
    if translated:
        error = pytest.importorskip("s3fs.errors").translate_boto_error(error)
    check(error, status, expected)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", STAYS),
        (403, "InvalidAccessKeyId", STAYS),
        (403, "SignatureDoesNotMatch", STAYS),
        (403, "RequestTimeTooSkewed", STAYS),
        (400, "ExpiredToken", STAYS),
        (400, "InvalidToken", STAYS),
        (404, "NoSuchKey", STAYS),
        (404, "NoSuchBucket", STAYS),
        (403, "InvalidObjectState", STAYS),  # in the archive
        (416, "InvalidRange", STAYS),
        (301, "PermanentRedirect", STAYS),
        (400, "RequestTimeout", AWAY),
        (409, "OperationAborted", AWAY),
        (503, "SlowDown", AWAY),
        (400, "ThrottlingException", AWAY),
        (503, "ServiceUnavailable", AWAY),
        (500, "InternalError", PASSES),
    ],
)
def test_s3_by_code(status, code, expected):
    translate = pytest.importorskip("s3fs.errors").translate_boto_error
    assert verdict(boto(status, code)) == expected
    assert verdict(translate(boto(status, code))) == expected


def test_s3_without_an_answer():
    exceptions = pytest.importorskip("botocore.exceptions")
    away = [
        exceptions.EndpointConnectionError(endpoint_url="https://h"),
        exceptions.ConnectTimeoutError(endpoint_url="https://h"),
        exceptions.ReadTimeoutError(endpoint_url="https://h"),
        exceptions.ConnectionClosedError(endpoint_url="https://h"),
        exceptions.HTTPClientError(error="x"),
        exceptions.ResponseStreamingError(error="x"),
        exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        exceptions.MetadataRetrievalError(error_msg="x"),
        exceptions.CredentialRetrievalError(provider="p", error_msg="x"),
    ]
    assert {verdict(error) for error in away} == {AWAY}
    stays = [
        exceptions.NoCredentialsError(),
        exceptions.PartialCredentialsError(provider="p", cred_var="v"),
        exceptions.ProfileNotFound(profile="p"),
        exceptions.UnauthorizedSSOTokenError(),
        exceptions.NoRegionError(),
        exceptions.InvalidRegionError(region_name="r"),
        exceptions.ParamValidationError(report="r"),
        exceptions.SSLError(endpoint_url="https://h", error="[SSL: CERTIFICATE_VERIFY_FAILED] x"),
    ]
    assert {verdict(error) for error in stays} == {STAYS}


# gcsfs's and google.auth's, as gcsfs 2026.10.1 (retry.py, validate_response) raises them.
class HttpError(Exception):
    def __init__(self, code, message):
        super().__init__(f"{message}, {code}")
        self.code, self.message = code, message


class GoogleAuthError(Exception):
    retryable = False


class DefaultCredentialsError(GoogleAuthError): ...


class TransportError(GoogleAuthError): ...


class RefreshError(GoogleAuthError): ...


class ChecksumError(Exception): ...


class NonRetryableError(Exception): ...


def refused_by_gcs(message="alice does not have storage.objects.get access"):
    return OSError(f"Forbidden: b/bucket/o/a.tar\n{message}")


@pytest.mark.parametrize(("status", "expected"), STATUSES)
@pytest.mark.parametrize("form", [int, str])
def test_gs(status, expected, form):
    check(HttpError(form(status), "told"), status, expected)


def test_gs_by_its_own_errors():
    check(refused_by_gcs(), 403, STAYS)
    assert answers.reason(refused_by_gcs(), 30).startswith("HTTP status 403: Forbidden: b/bucket/o/a.tar alice")
    assert verdict(refused_by_gcs("User Rate Limit Exceeded.")) == AWAY
    assert answers.kind_of_failure(refused_by_gcs("User Rate Limit Exceeded.")) is None
    stays = [FileNotFoundError("b"), ValueError("Bad Request: b"), DefaultCredentialsError("none"), NonRetryableError()]
    assert {verdict(error) for error in [*stays, RefreshError("invalid_grant")]} == {STAYS}
    metadata = RefreshError("no metadata server")
    metadata.__cause__ = TransportError("refused")
    retryable = RefreshError("internal_failure")
    retryable.retryable = True
    assert {verdict(error) for error in (TransportError("x"), metadata, retryable, ChecksumError())} == {AWAY}
    auth = pytest.importorskip("google.auth.exceptions")
    assert verdict(auth.DefaultCredentialsError("none")) == verdict(auth.RefreshError("invalid_grant")) == STAYS
    assert verdict(auth.TransportError("x")) == AWAY


def hub_error(status, **headers):
    errors = pytest.importorskip("huggingface_hub.errors")
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])
    url = "https://huggingface.co/api/datasets/me/data"
    response = http.Response(status, headers=headers, request=http.Request("GET", url))
    utils = importlib.import_module("huggingface_hub.utils")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        utils.hf_raise_for_status(response)
    return caught.value


@pytest.mark.parametrize(("status", "expected"), [row for row in STATUSES if row[0] >= 400])
def test_hf(status, expected):
    check(hub_error(status), status, expected)


def test_hf_by_its_own_errors():
    errors = pytest.importorskip("huggingface_hub.errors")
    assert verdict(hub_error(403, **{"X-Error-Code": "GatedRepo"})) == STAYS
    private = FileNotFoundError("datasets/me/data (repository not found)")  # as its file system says it
    private.__cause__ = hub_error(401)
    assert verdict(private) == STAYS
    assert answers.kind_of_failure(private) is PermissionError
    assert answers.reason(private, 30).startswith("HTTP status 401")
    assert verdict(errors.OfflineModeIsEnabled("offline")) == verdict(errors.HFValidationError("name")) == STAYS
    assert verdict(errors.EntryNotFoundError("x")) == verdict(errors.LocalTokenNotFoundError("x")) == STAYS
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])
    for away in (http.ConnectError("x"), http.ReadTimeout("x"), http.RemoteProtocolError("x"), http.ProxyError("x")):
        assert verdict(away) == AWAY
    assert verdict(http.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] x")) == STAYS
    assert verdict(http.UnsupportedProtocol("x")) == verdict(http.TooManyRedirects("x")) == STAYS


def test_in_memory():
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
    memory.pipe_file("/answers/folder/file", b"x")
    for name in ("/answers/none", "/answers/folder"):
        with pytest.raises(OSError, match="answers") as caught:
            memory.cat_file(name)
        assert verdict(caught.value) == STAYS


def test_what_nobody_knows_may_pass():
    assert verdict(RuntimeError("what is this")) == verdict(Unreachable("x")) == AWAY
