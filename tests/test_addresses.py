"""Which part of an address names an object, and which signs it."""

import pytest

from mpp.errors import split_query

S3 = "X-Amz-Algorithm=A&X-Amz-Credential=A%2F1&X-Amz-Date=1&X-Amz-Expires=9&X-Amz-SignedHeaders=host"
SIGNED = {
    "S3": f"{S3}&X-Amz-Security-Token=t&X-Amz-Signature=f",
    "S3, version 2": "AWSAccessKeyId=A&Signature=s%3D&Expires=1",
    "CloudFront": "Expires=1&Signature=s&Key-Pair-Id=K",
    "CloudFront, by policy": "Policy=p&Signature=s&Key-Pair-Id=K&Hash-Algorithm=SHA256",
    "Google": "X-Goog-Algorithm=G&X-Goog-Credential=c&X-Goog-Date=1&X-Goog-Expires=9&X-Goog-Signature=f",
    "Google, version 2": "GoogleAccessId=a&Expires=1&Signature=s",
    "Azure": "sv=2024&ss=b&srt=o&sp=r&se=1&st=0&spr=https&sip=1&sr=b&si=i&sig=s%3D",
    "Azure, by a user": "skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5&sv=2024&sr=d&sdd=2&sp=r&se=1&sig=s",
    "Alibaba": "OSSAccessKeyId=a&Expires=1&Signature=s",
    "Tencent": "q-sign-algorithm=sha1&q-ak=a&q-sign-time=1&q-key-time=1&q-header-list=&q-url-param-list=&q-signature=s",
    "Akamai": "hdnea=exp~hmac",
    "tokens": "token=a&access_token=b&auth-token=c&api_key=d&expires=1",
}


@pytest.mark.parametrize("query", SIGNED.values(), ids=SIGNED)
def test_a_signature_names_nothing(query: str) -> None:
    assert split_query(f"https://user:password@h/a.tar?{query}") == ("https://h/a.tar", query)
    first, _, rest = query.partition("&")
    mixed = f"https://h/a.tar?id=1&{first}&v=2" + (f"&{rest}" if rest else "")
    assert split_query(mixed) == ("https://h/a.tar?id=1&v=2", query)


# Without `sig`, the one with `st` is none of Azure's.
NAMES = "id=1 file=a.tar versionId=3 generation=3 key=folder/a.tar st=1&se=2&sp=3&sr=4&sv=5&si=6 signature_of=1"


@pytest.mark.parametrize("query", [*NAMES.split(), "download", "response-content-type=x"])
def test_everything_else_names_the_object(query: str) -> None:
    assert split_query(f"https://h/a.tar?{query}") == (f"https://h/a.tar?{query}", "")


def test_addresses_without_a_query() -> None:
    assert split_query("https://h/a.tar") == split_query("https://h/a.tar?") == ("https://h/a.tar", "")
