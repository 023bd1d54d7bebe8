"""Access to the routes: keys, origins of web pages, and names of this host."""

import dataclasses
import ipaddress
import socket
from collections.abc import Container
from urllib.parse import urlsplit

from aiohttp import web

from eep_jax.config import ServeConfig
from eep_jax.runtime.control.admin_key import run_admin_key
from eep_jax.runtime.http.checks import SHORT, RequestError
from eep_jax.runtime.http.key_file import KeyFile, KeySet

ADMIN_ROUTES = ("/v1/fault_tolerance/", "/server_info")  # what begins so
# For probes and scrapers: they show no prompt and no pid.
OPEN_ROUTES = ("/health", "/livez", "/readyz", "/ping", "/version", "/metrics")
AUTHENTICATE = {"WWW-Authenticate": 'Bearer realm="eep-jax"'}
JSON = "application/json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """What a request must bring. None: a key is not needed.

    A key of `admin` is also good for what needs one of `api`. With `api` alone, only the run's own
    processes, by `run`, may use the routes of the admin.
    """

    api: Container[str] | None = None
    admin: Container[str] | None = None
    run: Container[str] = KeySet()
    hosts: frozenset[str] = frozenset({"localhost"})  # lower case; addresses are known anyway
    origins: frozenset[str] = frozenset()  # hosts of web pages that may call from elsewhere
    readers: frozenset[str] = frozenset()  # origins whose pages may ask for completions; "*": all

    def check(self, route: str, headers) -> None:
        """Raises RequestError where a request of these headers may not call the route."""
        if route in OPEN_ROUTES:
            return
        is_admin = route.startswith(ADMIN_ROUTES)
        if is_admin or not {"*", headers.get("Origin")} & self.readers:
            check_origin(headers, self.hosts, self.origins)
        if is_admin:
            check_host(headers.get("Host", ""), self.hosts)
        if self.api is None and (self.admin is None or not is_admin):
            return
        key = _bearer(headers.get("Authorization", ""))
        # Every set is asked, so that time does not tell which one has the key.
        asked = [key in keys for keys in (self.run, self.admin or (), self.api or ())]
        if any(asked[:2]) or (asked[2] and not is_admin):
            return
        if asked[2]:
            message = "this key may ask for completions only; send one of --admin_key_file"
            raise RequestError(403, "Authorization", message, code="admin_key_required")
        file = "--admin_key_file" if is_admin else "--api_key_file"
        problem = "is not known" if key else "is missing"
        message = f"the key {problem}; send `Authorization: Bearer KEY` with a key of {file}"
        raise RequestError(401, "Authorization", message, code="invalid_api_key")


EVERYONE = Access()


def open_access(serve: ServeConfig, token: str) -> Access:
    """The access that the configuration asks for. Raises ValueError for a key file."""
    allowed = frozenset(name.lower() for name in serve.allowed_hosts)
    own = {name.lower() for name in ("localhost", serve.host, socket.gethostname())}
    return Access(
        api=KeyFile(serve.api_key_file) if serve.api_key_file else None,
        admin=KeyFile(serve.admin_key_file) if serve.admin_key_file else None,
        run=KeySet([run_admin_key(token)]),
        hosts=allowed | own,
        origins=allowed,
    )


def exposure(serve: ServeConfig) -> str:
    """What others than this host may do without a key, as a warning; '' if nothing."""
    # With keys of clients alone, only the run's own processes change the cluster.
    if is_loopback(serve.host) or serve.api_key_file:
        return ""
    what = "ask for completions" if serve.admin_key_file else "ask for completions and drain ranks"
    return (
        f"the API listens on {serve.host} and whoever reaches it may {what}: give --api_key_file "
        "and --admin_key_file, or put a proxy that authenticates in front of it"
    )


def is_loopback(host: str) -> bool:
    """Whether only this host reaches a listener at `host`.

    Example:
        >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "")]
        [True, True, True, False, False]
    """
    address = _address(host)
    return address.is_loopback if address is not None else host.lower() == "localhost"


def check_host(host: str, names: frozenset[str]) -> None:
    """Raises RequestError for a Host that is neither an address nor a name of this service.

    A web page may point a name of its own at this host (DNS rebinding), but not an address.
    """
    name = _name(host)
    if name and (_address(name) is not None or name in names):
        return
    message = (
        f"Host is {SHORT.repr(host)}; use this host's address or name, or start with "
        "--allowed_hosts=NAME"
    )
    raise RequestError(403, "Host", message, code="foreign_host")


def check_origin(headers, names: frozenset[str], origins: frozenset[str]) -> None:
    """Raises RequestError for a request that a web page of another origin sends."""
    origin = headers.get("Origin")
    site = headers.get("Sec-Fetch-Site", "same-origin")
    if origin is None and site in ("same-origin", "none"):
        return
    if origin is not None:
        try:
            sender = urlsplit(origin).netloc.lower()
        except ValueError:
            sender = ""
        own = headers.get("Host", "").lower()
        if sender and (sender == own or _name(sender) in origins):
            check_host(own, names)  # else a page whose name was pointed here would be its own
            return
    message = (
        f"Origin is {SHORT.repr(origin or site)}, another web page's; call from a page of this "
        "service, or start with --allowed_hosts=NAME"
    )
    raise RequestError(403, "Origin", message, code="foreign_origin")


def check_is_json(http: web.Request) -> None:
    """Raises RequestError unless the body is sent as JSON, which no web form can."""
    if http.content_type == JSON:
        return
    sent = http.headers.get("Content-Type")
    message = f"Content-Type is {SHORT.repr(sent)}; send {JSON}"
    raise RequestError(415, "Content-Type", message, code="unsupported_media_type")


def guard(access: Access):
    """A middleware that refuses what `access` does not allow, before any body is read."""

    @web.middleware
    async def middleware(http: web.Request, handler) -> web.StreamResponse:
        resource = http.match_info.route.resource
        access.check(resource.canonical if resource is not None else "", http.headers)
        return await handler(http)

    return middleware


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _name(authority: str) -> str:
    """Host part of `host:port`, lower case, without brackets; '' where there is none."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").lower()
    except ValueError:
        return ""


def _address(name: str):
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
