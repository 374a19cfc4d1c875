"""A web page or a git repository, fetched when a person names it, and from public addresses alone.

A name is resolved here, once. Every address it has must be public, and the connection goes to the one that was checked, so a second answer
of the name server counts for nothing (DNS rebinding); TLS still asks for the name. Each redirect is checked like the first address, one
clock runs over all of it, and no proxy, cookie, password or compression takes part. Git gets the same address, https alone, one commit,
and nothing it could run: no hooks, submodules, filters (LFS) or configuration of the user. Teredo and 6to4 addresses are refused.
"""

import http.client
import ipaddress
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from garage.core.errors import UserError
from garage.data.extract import MIMES, RECORDS, TEXTS

_UNICAST, _NAT64, *_TUNNELS = map(ipaddress.ip_network, ("2000::/3", "64:ff9b::/96", "2001::/32", "2002::/16"))
_TYPES = {"text/html": ".html", "application/xhtml+xml": ".html", "text/plain": ".txt", "text/markdown": ".md", "text/csv": ".csv",
          "application/json": ".json", "application/yaml": ".yaml", "application/zip": ".zip",
          **{mime: suffix for suffix, mime in MIMES.items() if suffix != ".htm"}}  # fmt: skip
_KNOWN, _VAGUE = {*MIMES, *RECORDS, *TEXTS, ".zip"}, ("text/plain", "application/octet-stream", "binary/octet-stream")
_PORTS, MAX_REDIRECTS, MAX_FILES, _BY_HAND = {"https": 443, "http": 80}, 5, 20_000, "if you trust it, save it yourself and give the file"
_GIT = {"http.followRedirects": "false", "http.proxy": "", "core.hooksPath": os.devnull, "credential.helper": "", "protocol.allow": "never"}
_CLONE = ("clone", "--quiet", "--depth=1", "--single-branch", "--no-tags", "--no-recurse-submodules", "--template=", "--")
_ALONE = {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, also if it carries another one inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if getattr(ip, "ipv4_mapped", None) or ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    is_plain = ip.version == 4 or (ip in _UNICAST and not any(ip in tunnel for tunnel in _TUNNELS))
    return is_plain and ip.is_global and not (ip.is_multicast or ip.is_reserved)


class Rules(NamedTuple):
    """What may be fetched, and how much."""

    schemes: tuple[str, ...] = ("https", "http")
    max_bytes: int = 100 << 20
    seconds: float = 60.0
    is_allowed: Callable[[str], bool] = is_public


WEB, GIT = Rules(), Rules(("https",), 500 << 20, 600.0)


def fetch(url: str, folder: Path, rules: Rules = WEB) -> tuple[Path, str]:
    """Write what stands at an address into `folder`: the file, and the address where it was found in the end; or a `UserError`."""
    deadline = time.monotonic() + rules.seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts, port, address = _checked(url, rules)
        with _answer(parts, (address, port), rules, deadline) as answer:
            if not 300 < answer.status < 309:
                return _kept(answer, parts, folder, rules.max_bytes)
            url = urljoin(url, answer.headers.get("Location", ""))
    raise UserError(f"it leads on to {url}, the redirect after {MAX_REDIRECTS}", remedy="give the address where it ends")


def _checked(url: str, rules: Rules) -> tuple[SplitResult, int, str]:
    """The parts of an address, its port, and the checked number behind its name."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in rules.schemes or not parts.hostname or parts.username is not None:
            raise UserError(f"{url} is not fetched", remedy=f"give {rules.schemes[0]}://name/path, without user name and password")
        port = parts.port or _PORTS[parts.scheme]
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    except (OSError, ValueError) as error:
        raise UserError(f"{url} cannot be found: {error}", remedy="check the name and the connection") from error
    if bad := [address for address in addresses if not rules.is_allowed(address)]:
        raise UserError(f"{parts.hostname} has the address {bad[0]}, which is not of the public internet", remedy=_BY_HAND)
    return parts, port, addresses[0]


@contextmanager
def _answer(url: SplitResult, place: tuple[str, int], rules: Rules, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """The answer to one GET, not yet read; at the deadline the connection is cut, however slowly it still speaks."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(url.hostname), place[1])
    path = quote(url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl(), safe="/%:=&?~+!$,;'@()*[]")
    try:
        with ExitStack() as stack:
            live = stack.enter_context(socket.create_connection(place, max(1.0, deadline - time.monotonic())))
            (clock := Timer(max(0.0, deadline - time.monotonic()), _cut, (live,))).start()
            stack.callback(clock.cancel)
            tls = ssl.create_default_context().wrap_socket if url.scheme == "https" else None
            connection.sock = tls(live.dup(), server_hostname=url.hostname) if tls else live.dup()
            connection.request("GET", path, headers={"User-Agent": "llm-garage", "Accept-Encoding": "identity", "Connection": "close"})
            yield connection.getresponse()
            if time.monotonic() > deadline:
                raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        why = f"it takes longer than {rules.seconds:g} s" if time.monotonic() > deadline else error
        raise UserError(f"{url.geturl()} cannot be fetched: {why}", remedy=_BY_HAND) from error


def _cut(live: socket.socket) -> None:
    with suppress(OSError):
        live.shutdown(socket.SHUT_RDWR)


def _kept(answer: http.client.HTTPResponse, parts: SplitResult, folder: Path, max_bytes: int) -> tuple[Path, str]:
    url, kind, name = parts._replace(fragment="").geturl(), answer.headers.get_content_type(), Path(unquote(parts.path))
    if answer.status != 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{url} answers {answer.status} {answer.reason}", remedy="open it in a browser; what needs a login is not read")
    if (suffix := name.suffix.lower() if kind in _VAGUE and name.suffix.lower() in _KNOWN else _TYPES.get(kind)) is None:
        raise UserError(f"{url} is of type {kind}, which is not read", remedy=_BY_HAND)
    if len(data := answer.read(max_bytes + 1)) > max_bytes or answer.length:
        raise UserError(f"{url} ends early, or is larger than {max_bytes >> 20} MB", remedy=_BY_HAND)
    charset = (kind.startswith("text/") and answer.headers.get_content_charset()) or "utf-8"
    place = folder / ((re.sub(r"[^\w-]+", "_", name.stem)[:50] or "page") + suffix)
    place.write_bytes(data if charset == "utf-8" else data.decode(charset).encode("utf-8-sig"))
    return place, url


def clone(url: str, folder: Path, rules: Rules = GIT) -> tuple[Path, str]:
    """The latest commit of a repository, checked out below `folder`, and its name `url@commit`; or a `UserError`."""
    if shutil.which("git") is None:
        raise UserError("a repository needs the program git, which is not installed", remedy="install git, or give a folder")
    parts, port, address = _checked(url.removeprefix("git+"), rules)
    source, place, said, sizes = parts._replace(query="", fragment="").geturl(), folder / "repository", folder / "git.txt", list[int]()
    settings = _GIT | {f"protocol.{parts.scheme}.allow": "always", "http.curloptResolve": f"{parts.hostname}:{port}:{address}"}
    command = ["git", *(part for setting in settings.items() for part in ("-c", "=".join(setting))), *_CLONE, source, str(place)]
    alone, deadline = _ALONE | {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder)}, time.monotonic() + rules.seconds
    with open(said, "wb") as out:
        git = subprocess.Popen(command, env=alone, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    is_done = is_over = False
    while not is_done:
        time.sleep(0.05)
        is_done = git.poll() is not None  # measured once more after that: it may have been quick
        with suppress(FileNotFoundError):  # git renames what it writes
            sizes = [Path(at, name).lstat().st_size for at, _, names in os.walk(folder) for name in names]
        is_over = is_over or time.monotonic() > deadline or sum(sizes) > rules.max_bytes or len(sizes) > MAX_FILES
        if is_over and not is_done:
            os.killpg(git.pid, signal.SIGKILL)
    if is_over or git.returncode:
        limits = f"more than {rules.seconds:g} s, {rules.max_bytes >> 20} MB or {MAX_FILES:,} files"
        why = limits if is_over else said.read_text(errors="replace").strip()[-300:]
        raise UserError(f"cloning {source} fails: {why}", remedy="check the address; if it is large or needs a login, clone it yourself")
    return place, f"{source}@{subprocess.check_output(['git', '-C', str(place), 'rev-parse', 'HEAD'], env=alone, text=True).strip()}"
