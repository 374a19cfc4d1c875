"""Who may ask, and how much: API keys with limits of their own.

A key is kept as its SHA-256 and compared in constant time with all of them. Keys come from `api_key` or from a file with lines

    NAME  sk-... or sha256:HEX  [requests=60] [tokens=100000] [concurrency=4] [admin]

(requests and tokens a minute; what is not given is not limited; `#` begins a comment). Limits are token buckets that fill steadily.
A request is let in while there is something in both; the tokens it used, prompt and answer, are taken when they are known, so one
long answer may overdraw the bucket, and the next request waits until it is paid for. `x-api-key` has the same limits as `Authorization`.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from garage.core.errors import UserError
from garage.core.files import read_file
from garage.serve.errors import ApiError, limited
from garage.specs.serve import ServeSpec

MAX_FILE = 1 << 20


@dataclass
class Bucket:
    """`size` a minute, filled steadily; 0 is no limit."""

    size: int = 0
    level: float = 0.0
    filled: float = field(default_factory=time.monotonic)

    def wait(self, need: float) -> float:
        """Seconds until `need` is there."""
        now = time.monotonic()
        self.level = min(self.size, self.level + (now - self.filled) * self.size / 60)
        self.filled = now
        return (need - self.level) * 60 / self.size if self.size and self.level < need else 0.0

    def headers(self, what: str) -> dict[str, str]:
        """What is left, in OpenAI's names."""
        if not self.size:
            return {}
        values = {"limit": str(self.size), "remaining": str(max(0, int(self.level))), "reset": f"{self.wait(self.size):.3f}s"}
        return {f"x-ratelimit-{name}-{what}": value for name, value in values.items()}


@dataclass
class Tenant:
    """Whoever holds one key. `salt` keeps its cached prompts apart from those of other keys."""

    name: str = ""
    digest: bytes = b""
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    concurrency: int = 0
    is_admin: bool = False
    salt: str = ""
    num_inside: int = 0

    def enter(self) -> None:
        """Let one request in.

        Raises:
            ApiError: 429, with the time to wait.
        """
        if self.concurrency and self.num_inside >= self.concurrency:
            raise limited(f"this key may have {self.concurrency} requests at once", 1)
        for bucket, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if seconds := bucket.wait(1):
                error = limited(f"this key may use {bucket.size} {what} a minute", seconds)
                error.headers |= self.headers()
                raise error
        self.requests.level -= 1
        self.num_inside += 1

    def leave(self) -> None:
        """A request that entered has been answered."""
        self.num_inside -= 1

    def spend(self, num_tokens: int) -> None:
        """Take tokens that were used."""
        self.tokens.wait(0)
        self.tokens.level -= num_tokens

    def headers(self) -> dict[str, str]:
        return {**self.requests.headers("requests"), **self.tokens.headers("tokens")}


class Keys:
    """The keys of one server; without any, everyone is the one tenant without limits."""

    def __init__(self, spec: ServeSpec) -> None:
        given = [Tenant(f"key {n}", _digest(key.get_secret_value())) for n, key in enumerate(spec.api_key, 1)]
        self._tenants = [*given, *_from_file(spec)]
        self._anyone = Tenant()
        if len(self._tenants) > 1 and not spec.share_prefix_cache:
            for tenant in self._tenants:
                tenant.salt = secrets.token_hex(16)
        for tenant in self._tenants:
            tenant.requests.level, tenant.tokens.level = tenant.requests.size, tenant.tokens.size

    @property
    def is_open(self) -> bool:
        """There are no keys."""
        return not self._tenants

    def find(self, headers: Mapping[str, str]) -> Tenant:
        """Whose key these headers carry.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if self.is_open:
            return self._anyone
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = _digest(headers.get("x-api-key") or (bearer.strip() if kind.lower() == "bearer" else ""))
        found = [tenant for tenant in self._tenants if hmac.compare_digest(given, tenant.digest)]
        if not found:
            text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found[0]


def _from_file(spec: ServeSpec) -> Iterator[Tenant]:
    if spec.api_keys_file is None:
        return
    data = read_file(spec.api_keys_file)
    if data is None or len(data) > MAX_FILE:
        raise UserError(f"the file of keys {spec.api_keys_file} is missing or too large", remedy="check api_keys_file")
    lines = [line.partition("#")[0].split() for line in data.decode("utf-8", "replace").splitlines()]
    for number, words in enumerate(lines, 1):
        if words:
            yield _tenant(words, f"line {number} of {spec.api_keys_file}")
    if not any(lines):
        raise UserError(f"{spec.api_keys_file} has no key", remedy="write one line a key: NAME sk-...")


def _tenant(words: list[str], where: str) -> Tenant:
    try:
        name, key, *options = words
        digest = bytes.fromhex(key.removeprefix("sha256:")) if key.startswith("sha256:") else _digest(key)
        numbers = {what: int(value) for what, _, value in (option.partition("=") for option in options if option != "admin")}
        sizes = [numbers.pop(what, 0) for what in ("requests", "tokens", "concurrency")]
        if numbers or len(digest) != 32 or min(sizes) < 0:
            raise ValueError(f"{numbers or sizes}")
    except ValueError as error:
        remedy = "write NAME KEY [requests=N] [tokens=N] [concurrency=N] [admin]; KEY is sk-... or sha256: and 64 hex digits"
        raise UserError(f"{where} is no key", remedy=remedy) from error
    return Tenant(name, digest, Bucket(sizes[0]), Bucket(sizes[1]), sizes[2], "admin" in options)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
