"""Addresses as they may be printed and written down, and which part of them names the object."""

import re

_ADDRESS = re.compile(r"(\w+)://(?:[^\s/?#'\"]*@)?([^\s?#'\"]*)([?][^\s'\"]*)?")

_SIGNS = re.compile(
    r"x-(amz|goog|oss|cos|obs|ms)-.*|awsaccesskeyid|ossaccesskeyid|googleaccessid|key-pair-id|keyname|urlprefix|policy"
    r"|hash-algorithm|signature|sig|hmac|expires|expiry|q-(ak|header-list|url-param-list|sign.*|key-time)"
    r"|((access|auth|session|id)[_-]?)?token|__token__|hdnts|hdnea|__gda__|api[_-]?key",
    re.IGNORECASE,
)
"""Names of parameters that sign an address: of S3, Google, Azure, Alibaba, Tencent, CloudFront, Akamai and others."""
_SAS = re.compile("s[vstrpei]|srt|sip|spr|sk(oid|tid|t|e|s|v)|saoid|suoid|scid|sdd|ses|rsc[cdelt]")
"""Those of Azure that are too short to go by their names alone; `sig` is always with them."""


def split_query(url: str) -> tuple[str, str]:
    """The part of an http address that names the object, and what of its query signs it, joined by &.

    A signature changes from day to day and is no other object; each other parameter may make it another. User names
    and passwords are in neither part.
    """
    address, _, query = url.partition("?")
    address = without_credentials(address)
    parameters = [parameter for parameter in query.split("&") if parameter]
    names = [parameter.partition("=")[0].lower() for parameter in parameters]
    azure = "sig" in names
    signs = [bool(_SIGNS.fullmatch(name)) or (azure and bool(_SAS.fullmatch(name))) for name in names]
    naming = "&".join(parameter for parameter, one in zip(parameters, signs, strict=True) if not one)
    signing = "&".join(parameter for parameter, one in zip(parameters, signs, strict=True) if one)
    return f"{address}?{naming}" if naming else address, signing


def without_credentials(text: str) -> str:
    """The text with no user names and passwords in its URLs, and no queries, which may be signed, in those of http."""

    def bare(found: re.Match[str]) -> str:
        query = "" if found[1].lower().startswith("http") else found[3] or ""
        return f"{found[1]}://{found[2]}{query}"

    return _ADDRESS.sub(bare, text)
