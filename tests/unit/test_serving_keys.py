from __future__ import annotations

import hmac
import logging
import time
from pathlib import Path

import pytest

from distft.errors import JobError
from distft.serving import keys as rooms_keys
from distft.serving.keys import Allowance, Bucket, Keys, Rates
from distft.serving.protocol import ApiError

ONE, TWO = "sk-1111111111111111", "sk-2222222222222222"


def written(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at once a second."""
    now = time.monotonic() + 2
    monkeypatch.setattr(rooms_keys.time, "monotonic", lambda: now)


def test_a_file_names_several_keys_and_comments_say_nothing(tmp_path: Path) -> None:
    known = Keys(file=written(tmp_path / "keys", f"# ours\n\nalice:{ONE}\n{TWO}\n"))
    assert known.owner(ONE) == "alice"
    assert known.owner(TWO) == "key-4"
    assert known.owner(f"{ONE}x") is None
    assert known.owner("") is None
    assert known.owner("\udcff é") is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_file_that_others_can_read_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    file = written(tmp_path / "keys", ONE, mode)
    with pytest.raises(JobError, match=f"chmod 600 {file}"):
        Keys(file=file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "short",
        f"a b:{ONE}",
        f"alice:{ONE}\nalice:{TWO}",
        f"a:{ONE}\nb:{ONE}",
        "alice:with a blank inside it",
        f"alice:{ONE} requests=0",
        f"alice:{ONE} requests=3 requests=4",
        f"alice:{ONE} token=3",
        f"alice:{ONE} {TWO}",
    ],
)
def test_a_broken_file_is_refused_without_telling_its_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(JobError) as told:
        Keys(file=written(tmp_path / "keys", text))
    assert ONE not in str(told.value)
    assert TWO not in str(told.value)
    assert "blank inside" not in str(told.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        Keys(file=tmp_path / "keys")


def test_a_made_key_is_told_once_and_kept_as_a_salted_hash() -> None:
    known, key = Keys.made()
    assert known.owner(key) == "default"
    assert len(key) > 40
    assert key not in repr(vars(known))
    assert Keys.listed(f"a:{ONE}").hashes() != Keys.listed(f"a:{ONE}").hashes()


def test_hashes_are_enough_to_know_keys_in_another_process() -> None:
    known = Keys(Keys.listed(f"alice:{ONE}, {TWO}").hashes())
    assert known.owner(ONE) == "alice"
    assert known.owner(TWO) == "key-2"


def test_what_a_key_may_have_in_a_minute_stands_behind_it() -> None:
    listed = Keys.listed(f"alice:{ONE} requests=60 tokens=100000, {TWO} tokens=5")
    for known in (listed, Keys(listed.hashes())):
        assert known.owner(ONE) == "alice"
        assert known.rates("alice") == Rates(60, 100_000)
        assert known.rates("key-2") == Rates(None, 5)
    assert Keys.listed(ONE).rates("key-1") == Rates()
    assert Keys.made()[0].rates("default") == Rates()


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert Keys.listed(f"a:{ONE},b:{TWO}").owner(ONE) == "a"
    assert len(compared) == 2  # it does not stop at the first that fits
    assert all(len(a) == len(b) == 32 for a, b in compared)


def test_a_changed_file_is_read_again_and_a_broken_one_leaves_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "keys", ONE)
    known = Keys(file=file)
    written(file, f"{TWO}\n# longer\n")
    assert known.owner(TWO) is None  # not looked at yet
    later(monkeypatch)
    assert known.owner(TWO) == "key-1"
    assert known.owner(ONE) is None

    written(file, "broken")
    with caplog.at_level(logging.INFO, "distft"):
        later(monkeypatch)
        assert known.owner(TWO) == "key-1"
        later(monkeypatch)
        assert known.owner(TWO) == "key-1"
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not at every request
    file.unlink()
    later(monkeypatch)
    assert known.owner(TWO) == "key-1"


def test_a_bucket_fills_evenly_and_tells_how_long_to_wait() -> None:
    now = 0.0
    bucket = Bucket(60, clock=lambda: now)
    for _ in range(60):
        assert bucket.wait(1) == 0
        bucket.take(1)
    assert bucket.wait(1) == pytest.approx(1)
    now = 0.5
    assert bucket.wait(1) == pytest.approx(0.5)
    now = 1000.0
    bucket.take(90)  # a debt, of the 60 that it holds after however long
    assert bucket.wait(1) == pytest.approx(31)


def test_an_allowance_of_tokens_is_owed_until_it_has_come_back() -> None:
    allowance = Allowance(Rates(tokens=100))
    allowance.admit()
    allowance.spend(200)
    with pytest.raises(ApiError) as told:
        allowance.admit()
    assert told.value.status == 429
    assert 55 < (told.value.retry_after or 0) <= 61
