"""API keys: who may ask, and how much in a minute.

Keys are random and long, so that one round of SHA-256 with a salt keeps them: nobody can try 2^128 keys. Functions that
are slow on purpose (scrypt) are for passwords, which people choose, and would cost a tenth of a second for each request
(https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html). Short keys are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.errors import JobError
from distft.log import logger
from distft.serving.protocol import ApiError

SHORTEST = 16
"""Characters that a key has at least."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY = re.compile(r"[!-~]{16,512}")
_RATE = re.compile(r"(requests|tokens)=([1-9][0-9]{0,11})")
_LOOK_SECONDS = 1.0
_ADVICE = (
    "one `name:key` or key a line, such as alice:sk-1f7c…, and what it may have in a minute behind it: "
    "requests=60 tokens=100000; `openssl rand -hex 32` makes a key"
)


@dataclass(frozen=True)
class Rates:
    """What a key may have in a minute; None is no limit.

    Attributes:
        requests: That are sound.
        tokens: Read and written.
    """

    requests: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class _Hash:
    """A key that can be recognised but not told: ``name:salt:sha256(salt + key):requests:tokens``.

    Salt and digest are in hexadecimal; a rate that is not limited is empty.
    """

    name: str
    salt: bytes
    digest: bytes
    rates: Rates

    @classmethod
    def of(cls, name: str, key: str, rates: Rates = Rates()) -> _Hash:
        salt = secrets.token_bytes(16)
        return cls(name, salt, hashlib.sha256(salt + key.encode()).digest(), rates)

    @classmethod
    def parsed(cls, text: str) -> _Hash:
        name, salt, digest, *rates = text.split(":")
        found = Rates(*(float(rate) if rate else None for rate in rates))
        return cls(name, bytes.fromhex(salt), bytes.fromhex(digest), found)

    def __str__(self) -> str:
        rates = ("" if rate is None else str(rate) for rate in (self.rates.requests, self.rates.tokens))
        return ":".join((self.name, self.salt.hex(), self.digest.hex(), *rates))


class Keys:
    """The keys that open the API, each with the name of its owner.

    Args:
        hashes: What :meth:`hashes` of another object told: keys cross processes without being told.
        file: A file of keys, read again when it changes; a broken one leaves the keys as they were, and the log says
            so.

    Raises:
        JobError: The file cannot be read, others can read it, or it is wrong.
    """

    def __init__(self, hashes: Iterable[str] = (), file: Path | None = None) -> None:
        self._fixed = tuple(_Hash.parsed(each) for each in hashes)
        self._file, self._seen, self._looked = file, _version(file), time.monotonic()
        self._read = _hashed(_read(file), str(file)) if file else ()

    @classmethod
    def made(cls) -> tuple[Keys, str]:
        """A new key, which is told here and never again, and what recognises it."""
        key = f"sk-{secrets.token_urlsafe(32)}"
        return cls([str(_Hash.of("default", key))]), key

    @classmethod
    def listed(cls, text: str) -> Keys:
        """The keys of a text, such as DISTFT_API_KEYS: ``name:key`` or key, between commas or a line each.

        Raises:
            JobError: One of them is no key.
        """
        return cls([str(each) for each in _hashed(text.replace(",", "\n"), "DISTFT_API_KEYS")])

    def hashes(self) -> tuple[str, ...]:
        """All keys, salted and hashed: what another process needs to know them."""
        return tuple(str(each) for each in (*self._fixed, *self._read))

    def owner(self, key: str) -> str | None:
        """The name of a key; None where there is none such.

        It takes as long for every wrong key: all are compared, each in constant time.
        """
        self._look()
        found = None
        for each in (*self._fixed, *self._read):
            digest = hashlib.sha256(each.salt + key.encode("utf-8", "surrogatepass")).digest()
            if hmac.compare_digest(digest, each.digest):
                found = each.name
        return found

    def rates(self, name: str) -> Rates:
        """What the key of a name may have in a minute, as its line says."""
        return next((each.rates for each in (*self._fixed, *self._read) if each.name == name), Rates())

    def _look(self) -> None:
        """Reads the file again where it has changed, once a second at most."""
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked, version = now, _version(self._file)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._read = _hashed(_read(self._file), str(self._file))
        except JobError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("API keys read again: %d in %s", len(self._read), self._file)


def _version(file: Path | None) -> tuple[int, ...] | None:
    """What changes with a file; None where there is none."""
    try:
        facts = file.stat() if file else None
    except OSError:
        return None
    return facts and (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_mode)


def _read(file: Path) -> str:
    """A file that nobody else can read."""
    try:
        with file.open(encoding="utf-8") as text:
            mode = stat.S_IMODE(os.fstat(text.fileno()).st_mode)
            if mode & 0o077:
                raise JobError(f"others can read the API keys (mode {mode:o})", str(file), f"chmod 600 {file}")
            return text.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise JobError(f"the API keys cannot be read: {reason}", str(file), _ADVICE) from error


def _hashed(text: str, where: str) -> tuple[_Hash, ...]:
    """The keys of some lines; empty lines and those that begin with # say nothing."""
    found: dict[str, tuple[str, Rates]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        line, *words = line.split()
        name, colon, key = line.partition(":")
        if not colon:
            name, key = f"key-{number}", line
        place = f"{where}:{number}"  # never the line itself: it holds a secret
        if not _NAME.fullmatch(name):
            raise JobError("a name holds letters, digits, '_', '-' and '.', 64 at most", place, _ADVICE)
        if not _KEY.fullmatch(key):
            raise JobError(f"a key holds {SHORTEST} to 512 visible ASCII characters", place, _ADVICE)
        if name in found or any(key == known for known, _ in found.values()):
            raise JobError("this name or key is there already", place, _ADVICE)
        found[name] = key, _rates(words, place)
    if not found:
        raise JobError("there is no API key", where, _ADVICE)
    return tuple(_Hash.of(name, key, rates) for name, (key, rates) in found.items())


def _rates(words: Sequence[str], where: str) -> Rates:
    """What stands behind a key."""
    found: dict[str, float] = {}
    for word in words:
        told = _RATE.fullmatch(word)
        if told is None or told[1] in found:
            raise JobError("behind a key stand requests=N and tokens=N, each a whole number above 0", where, _ADVICE)
        found[told[1]] = float(told[2])
    return Rates(**found)


class Bucket:
    """So much in a minute: a bucket that fills evenly and holds a minute's worth.

    Args:
        per_minute: How much comes back in a minute, and how much can be had at once.
        clock: Seconds that never go back.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = self._level = float(per_minute)
        self._clock, self._filled = clock, clock()

    def wait(self, amount: float) -> float:
        """Seconds until an amount can be had; 0 where it can be had now."""
        self._fill()
        return max(0.0, (amount - self._level) * 60 / self._size)

    def take(self, amount: float) -> None:
        """Takes an amount, if need be as a debt: how long an answer is shows only while it is written."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._filled) * self._size / 60)
        self._filled = now


class Allowance:
    """What one key may still have in this minute.

    Args:
        rates: Of the key.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._requests = Bucket(rates.requests) if rates.requests else None
        self._tokens = Bucket(rates.tokens) if rates.tokens else None

    def admit(self) -> None:
        """Counts one request.

        Raises:
            ApiError: 429, where the key has had its share; it says when to come back.
        """
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket and (seconds := bucket.wait(1)):
                raise ApiError(
                    429,
                    f"this key has had its {what} for now; come back in {seconds:.0f} s",
                    "rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=seconds,
                )
        if self._requests:
            self._requests.take(1)

    def spend(self, tokens: int) -> None:
        """Counts tokens that were read or written."""
        if self._tokens:
            self._tokens.take(tokens)
