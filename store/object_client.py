"""Requests to object stores: one client per bucket, bounded retries, errors in words. obstore speaks the protocol.

Endpoint, region and credentials come from the environment, by the names that the AWS tools use: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_SKIP_SIGNATURE=true for public buckets.
No message repeats a credential.
"""

import datetime
import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vcache.store.errors import StoreUnavailable

if TYPE_CHECKING:  # loaded late: a local store needs none of it
    from obstore.store import ClientConfig, RetryConfig, S3Store

_T = TypeVar("_T")

# Waits of 0.1, 0.2, 0.4 ... seconds, about half a minute in all: a restart or a "slow down" is over by then.
MAX_RETRIES = 8
FIRST_WAIT_SECONDS = 0.1
# Of one request with its body, which is at most a few parts of object_file.py long.
REQUEST_SECONDS = 60
# Asked for credentials by obstore when the environment has none; it answers on machines of a cloud.
_METADATA_SERVICE = re.compile(r"/latest/(api/token|meta-data)|169\.254\.")
_CUT_ANSWER = re.compile(r"Generic S3 error: Error [^\n]*response body")
_USER_INFO = re.compile(r"//[^/@\s]+@")


def client(bucket: str) -> "S3Store":
    """The client of a bucket; one for the process, and another if the environment changes."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client(bucket, settings, MAX_RETRIES, FIRST_WAIT_SECONDS)


@functools.lru_cache(maxsize=16)
def _client(
    bucket: str, settings: tuple[tuple[str, str], ...], max_retries: int, first_wait_seconds: float
) -> "S3Store":
    from obstore.store import S3Store

    retry: RetryConfig = {
        "max_retries": max_retries,
        "retry_timeout": datetime.timedelta(minutes=3),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=first_wait_seconds),
            "max_backoff": datetime.timedelta(seconds=100 * first_wait_seconds),
            "base": 2,
        },
    }
    environment = dict(settings)
    options: ClientConfig = {"timeout": datetime.timedelta(seconds=REQUEST_SECONDS)}
    # Who writes http:// into the endpoint has said it; AWS_ALLOW_HTTP still decides where it is set.
    if environment.get("AWS_ENDPOINT_URL", "").startswith("http://") and "AWS_ALLOW_HTTP" not in environment:
        options["allow_http"] = True
    return S3Store(bucket, client_options=options, retry_config=retry)


def ask(bucket: str, url: str, doing: str, request: "Callable[[S3Store], _T]") -> _T:
    """What the request returns, which is repeated if it fails in a way that may pass; `doing` is "read", "written" ...

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: there is one, and the request was to create it.
        EOFError: the object is shorter than the range that was asked for.
        StoreUnavailable: anything else, when all retries are spent; names the bucket, the object and what to check.
    """
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        return _again_if_cut(lambda: request(client(bucket)))
    except AlreadyExistsError as error:
        raise FileExistsError(f"{url} is there already") from error
    except (FileNotFoundError, BaseError, ValueError) as error:
        text = str(error)
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
            raise FileNotFoundError(f"{url} is not there") from error
        if "416 Range Not Satisfiable" in text or "non-partial response" in text:
            raise EOFError(f"{url} is shorter") from error
        raise StoreUnavailable(_sentence(bucket, url, doing, text)) from error


def _again_if_cut(request: Callable[[], _T]) -> _T:
    """Ask again if an answer breaks off in its body, which obstore itself retries only while it reads an object."""
    from obstore.exceptions import GenericError

    for _ in range(MAX_RETRIES):
        try:
            return request()
        except GenericError as error:
            if not _CUT_ANSWER.match(str(error)):
                raise
    return request()


def is_panic(error: BaseException) -> bool:
    """Whether the error is that of obstore 0.12 for a range that lies behind the end of the object."""
    return type(error).__name__ == "PanicException"


def _sentence(bucket: str, url: str, doing: str, text: str) -> str:
    reason = _reason(text)
    if "NoSuchBucket" in text:
        return (
            f"there is no bucket {bucket!r} at {_endpoint()}. Make it first, as with  aws s3 mb s3://{bucket}  , or check the "
            "name, AWS_ENDPOINT_URL and AWS_REGION."
        )
    if _METADATA_SERVICE.search(text):
        return (
            f"{url} cannot be {doing}: no credentials for bucket {bucket!r}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(and AWS_SESSION_TOKEN, if there is one), or AWS_SKIP_SIGNATURE=true for a public bucket."
        )
    if any(word in text for word in ("403 Forbidden", "401 Unauthorized", "ExpiredToken")):
        return (
            f"access to bucket {bucket!r} is denied ({reason}): {url} cannot be {doing}. Check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and that they may list, get and put there."
        )
    if "BadScheme" in text:
        return f"{url} cannot be {doing}: {_endpoint()} is not encrypted. Allow it with AWS_ALLOW_HTTP=true."
    if "edirect" in text:
        return f"{url} cannot be {doing}: bucket {bucket!r} is in another region. Set AWS_REGION to it."
    return (
        f"{url} cannot be {doing}: {reason}. Check the network, AWS_ENDPOINT_URL ({_endpoint()}) and AWS_REGION, and run the "
        "command again: what is committed is kept."
    )


def _reason(text: str) -> str:
    """The gist of an error of obstore: the status and S3's own words, or what happened to the connection."""
    line = _USER_INFO.sub("//", text.split("\n\nDebug source")[0])
    retries = re.search(r"after (\d+) retries", line)
    tried = f" (after {retries[1]} retries)" if retries else ""
    status = re.search(r"status code: (\d{3}[^:]*)", line)
    codes = re.findall(r"<(?:Code|Message)>([^<]*)</", line)
    if status:
        return ", ".join([status[1].strip(), *codes]) + tried
    return line.split(" - ")[-1].splitlines()[0].removeprefix("Generic S3 error: ").strip() + tried


def _endpoint() -> str:
    return _USER_INFO.sub("//", os.environ.get("AWS_ENDPOINT_URL", "")) or "Amazon S3"
