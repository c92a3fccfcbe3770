import importlib
import ssl

import pytest

from mpp.data.sources.remote_errors import RangeNotSupported, http_status, is_away, kind_of_failure, may_pass, reason
from mpp.errors import Unreachable

STAYS, PASSES, AWAY = "stays", "passes", "away"

BY_STATUS = {
    STAYS: (301, 302, 304, 400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 412, 416, 451, 501, 505, 511),
    PASSES: (425, 500, 507, 509, 599),
    AWAY: (408, 429, 502, 503, 504, 520, 521, 522, 530),
}


def verdict(error):
    assert not (is_away(error) and not may_pass(error))
    assert "\n" not in reason(error, 30)
    return AWAY if is_away(error) else PASSES if may_pass(error) else STAYS


def check_statuses(make, least=300):
    """`make(status)`: the error that a library raises for an HTTP status, for each."""
    kinds = dict.fromkeys((401, 403, 407), PermissionError) | dict.fromkeys((404, 410), FileNotFoundError)
    for expected, statuses in BY_STATUS.items():
        for status in statuses:
            if status >= least:
                error = make(status)
                assert (http_status(error), verdict(error)) == (status, expected)
                assert isinstance(error, PermissionError) or kind_of_failure(error) is kinds.get(status)


def check_errors(stays, away):
    assert {type(error).__name__: verdict(error) for error in stays if verdict(error) != STAYS} == {}
    assert {type(error).__name__: verdict(error) for error in away if verdict(error) != AWAY} == {}


def test_https():
    aiohttp = pytest.importorskip("aiohttp")
    request = aiohttp.RequestInfo("https://h/a.tar", "GET", {}, "https://h/a.tar")
    check_statuses(lambda status: aiohttp.ClientResponseError(request, (), status=status, message="Why"))
    client = pytest.importorskip("aiohttp.client_exceptions")
    host = importlib.import_module("aiohttp.client_reqrep").ConnectionKey("h", 443, True, True, None, None, None)
    certificate = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    stays = [client.InvalidURL("h"), client.ClientConnectorCertificateError(host, certificate)]
    stays += [RangeNotSupported("whole files only"), FileNotFoundError("a"), ImportError("s3fs")]
    away = [client.ServerDisconnectedError(), client.ClientPayloadError("cut"), client.ConnectionTimeoutError("slow")]
    away += [client.ClientConnectorError(host, OSError(111, "refused")), client.ClientOSError(104, "reset")]
    check_errors(stays, [*away, TimeoutError()])


def boto(status, code="Unheard"):
    exceptions = pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return exceptions.ClientError(answer, "GetObject")


BY_CODE = {
    STAYS: "403 AccessDenied, 403 InvalidAccessKeyId, 403 SignatureDoesNotMatch, 403 RequestTimeTooSkewed, "
    "400 ExpiredToken, 400 InvalidToken, 404 NoSuchKey, 404 NoSuchBucket, 403 InvalidObjectState, 416 InvalidRange, "
    "301 PermanentRedirect",
    AWAY: "400 RequestTimeout, 409 OperationAborted, 503 SlowDown, 400 ThrottlingException, 503 ServiceUnavailable",
    PASSES: "500 InternalError",
}


def test_s3():
    translate = pytest.importorskip("s3fs.errors").translate_boto_error
    check_statuses(boto)
    check_statuses(lambda status: translate(boto(status)))
    for expected, codes in BY_CODE.items():
        for status, code in map(str.split, codes.split(", ")):
            error = boto(int(status), code)
            assert verdict(error) == verdict(translate(error)) == expected, code


def test_s3_without_an_answer():
    exceptions = pytest.importorskip("botocore.exceptions")
    url = {"endpoint_url": "https://h"}
    away = {
        **{f"{name}Error": url for name in ("EndpointConnection", "ConnectTimeout", "ReadTimeout", "ConnectionClosed")},
        **{name: {"error": "x"} for name in ("HTTPClientError", "ResponseStreamingError")},
        "IncompleteReadError": {"actual_bytes": 1, "expected_bytes": 2},
        "MetadataRetrievalError": {"error_msg": "x"},
        "CredentialRetrievalError": {"provider": "p", "error_msg": "x"},
    }
    stays = {
        **{name: {} for name in ("NoCredentialsError", "UnauthorizedSSOTokenError", "NoRegionError")},
        "PartialCredentialsError": {"provider": "p", "cred_var": "v"},
        "ProfileNotFound": {"profile": "p"},
        "InvalidRegionError": {"region_name": "r"},
        "ParamValidationError": {"report": "r"},
        "SSLError": {**url, "error": "[SSL: CERTIFICATE_VERIFY_FAILED] x"},
    }
    check_errors(*([getattr(exceptions, name)(**facts) for name, facts in each.items()] for each in (stays, away)))


class HttpError(Exception):
    """gcsfs's, as gcsfs 2026.10.1 (retry.py, validate_response) raises it."""

    def __init__(self, code, message="why"):
        super().__init__(f"{message}, {code}")
        self.code, self.message = code, message


def test_gs():
    check_statuses(HttpError)
    check_statuses(lambda status: HttpError(str(status)))
    refused = OSError("Forbidden: b/bucket/o/a.tar\nalice does not have storage.objects.get access")
    assert (http_status(refused), verdict(refused), kind_of_failure(refused)) == (403, STAYS, PermissionError)
    assert reason(refused, 30).startswith("HTTP status 403: Forbidden: b/bucket/o/a.tar alice")
    limited = OSError("Forbidden: b/bucket/o/a.tar\nUser Rate Limit Exceeded.")
    assert (verdict(limited), kind_of_failure(limited)) == (AWAY, None)
    checksum, settled = (type(name, (Exception,), {})() for name in ("ChecksumError", "NonRetryableError"))  # gcsfs's
    check_errors([FileNotFoundError("b"), ValueError("Bad Request: b"), settled], [checksum])
    auth = pytest.importorskip("google.auth.exceptions")
    metadata = auth.RefreshError("no metadata server")
    metadata.__cause__ = auth.TransportError("refused")
    away = [auth.TransportError("x"), metadata, auth.RefreshError("internal_failure", retryable=True)]
    check_errors([auth.DefaultCredentialsError("none"), auth.RefreshError("invalid_grant")], away)


def hub_error(status, **headers):
    errors = pytest.importorskip("huggingface_hub.errors")
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])
    request = http.Request("GET", "https://huggingface.co/api/datasets/me/data")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        importlib.import_module("huggingface_hub.utils").hf_raise_for_status(
            http.Response(status, headers=headers, request=request)
        )
    return caught.value


def test_hf():
    errors = pytest.importorskip("huggingface_hub.errors")
    check_statuses(hub_error, least=400)
    private = FileNotFoundError("datasets/me/data (repository not found)")  # as its file system says it
    private.__cause__ = hub_error(401)
    assert kind_of_failure(private) is PermissionError
    assert reason(private, 30).startswith("HTTP status 401")
    stays = [private, hub_error(403, **{"X-Error-Code": "GatedRepo"})]
    names = ("OfflineModeIsEnabled", "HFValidationError", "EntryNotFoundError", "LocalTokenNotFoundError")
    stays += [getattr(errors, name)("x") for name in names]
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])
    stays += [http.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] x"), http.UnsupportedProtocol("x")]
    stays += [http.TooManyRedirects("x")]
    away = [http.ConnectError("x"), http.ReadTimeout("x"), http.RemoteProtocolError("x"), http.ProxyError("x")]
    check_errors(stays, away)


def test_in_memory_and_unknown():
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
    memory.pipe_file("/answers/folder/file", b"x")
    for name in ("/answers/none", "/answers/folder"):
        with pytest.raises(OSError, match="answers") as caught:
            memory.cat_file(name)
        assert verdict(caught.value) == STAYS
    check_errors([], [RuntimeError("what is this"), Unreachable("x")])
