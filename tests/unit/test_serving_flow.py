"""How the pieces of an answer pass through the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from distft.serving.flow import gathered


async def told(pieces: AsyncGenerator[int], into: list[list[int]]) -> None:
    async for some in gathered(pieces, 0.2):
        into.append(some)


def test_the_first_piece_is_told_at_once_and_those_that_come_soon_after_together() -> None:
    async def pieces() -> AsyncGenerator[int]:
        for number in range(40):
            yield number
            await asyncio.sleep(0.01)

    found: list[list[int]] = []
    asyncio.run(told(pieces(), found))
    assert found[0] == [0]
    assert 1 < len(found) < 10
    assert [number for some in found for number in some] == list(range(40))


def test_the_last_pieces_do_not_wait() -> None:
    async def pieces() -> AsyncGenerator[int]:
        yield 1
        await asyncio.sleep(0)
        yield 2

    async def taken() -> list[list[int]]:
        async with asyncio.timeout(30):
            return [some async for some in gathered(pieces(), 3600)]

    assert asyncio.run(taken()) == [[1], [2]]


def test_what_came_before_an_error_is_told_before_it() -> None:
    async def pieces() -> AsyncGenerator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    found: list[list[int]] = []
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(told(pieces(), found))
    assert [number for some in found for number in some] == [1, 2]


def test_who_leaves_closes_them_at_once() -> None:
    closed = False

    async def pieces() -> AsyncGenerator[int]:
        nonlocal closed
        try:
            yield 1
            await asyncio.sleep(3600)
        finally:
            closed = True

    async def leave() -> bool:
        some = gathered(pieces(), 3600)
        assert await anext(some) == [1]
        await some.aclose()
        return closed

    assert asyncio.run(leave())


def test_nothing_is_told_of_an_answer_without_pieces() -> None:
    async def pieces() -> AsyncGenerator[int]:
        for number in ():
            yield number

    found: list[list[int]] = []
    asyncio.run(told(pieces(), found))
    assert found == []
