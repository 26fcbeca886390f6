"""The engine over transformers' continuous batching: its tokens against plain forward passes, alone and in company."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distft.errors import CapacityError
from distft.model import answers
from distft.serving.cache_size import cache_size
from distft.serving.protocol import ApiError, Sampling, Token
from distft.serving.sampling import next_token, nucleus
from distft.serving.transformers_engine import TransformersEngine

from .tiny_models import CONFIGS, VOCABULARY, tokenizer

TOKENIZER = tokenizer(["<|endoftext|>", "<s>", "</s>"], eos_token="</s>", bos_token="<s>")
PROMPTS = [[5 + 7 * number, *range(number + 3, 3 * number + 6)] for number in range(8)]
DRAWN = Sampling(24, temperature=0.9, top_p=0.9, seed=7)
LONG = 4096


def model_of(kind: str, context: int = 64) -> PreTrainedModel:
    """Random weights, large enough that its logits differ clearly."""
    config = CONFIGS[kind]()
    config.initializer_range, config.bos_token_id, config.eos_token_id = 0.4, 1, 2
    setattr(config, "n_positions" if kind == "gpt2" else "max_position_embeddings", context)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def engine(request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    made = TransformersEngine(model_of(request.param), TOKENIZER, concurrent=4)
    made.kind = request.param  # type: ignore[attr-defined]
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def long() -> Iterator[TransformersEngine]:
    """One answer at a time, of thousands of tokens that never end by themselves."""
    made = TransformersEngine(model_of("llama", LONG), TOKENIZER, concurrent=1)
    made.stop_ids = ()
    yield made
    asyncio.run(made.close())


async def written(engine: TransformersEngine, prompt: list[int], sampling: Sampling) -> list[Token]:
    return [token async for tokens in engine.write(prompt, sampling) for token in tokens]


async def together(engine: TransformersEngine, *asked: tuple[list[int], Sampling]) -> list[list[Token]]:
    return await asyncio.gather(*(written(engine, prompt, sampling) for prompt, sampling in asked))


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_greedy_answers_in_company_are_those_of_generate(engine: TransformersEngine) -> None:
    model = model_of(engine.kind)  # type: ignore[attr-defined]
    expected = [answers(model, TOKENIZER, [prompt], 30)[0] for prompt in PROMPTS]
    found = asyncio.run(together(engine, *((prompt, Sampling(30)) for prompt in PROMPTS), (PROMPTS[0], DRAWN)))
    for one, tokens in zip(expected, found, strict=False):
        assert ids(tokens[:-1] if one.stopped else tokens) == list(one.ids)
        assert (tokens[-1].id in engine.stop_ids) == one.stopped
    assert engine.busy() == 0


def test_a_seed_repeats_alone_and_in_company(engine: TransformersEngine) -> None:
    alone = asyncio.run(written(engine, PROMPTS[3], DRAWN))
    others = [(prompt, replace(DRAWN, seed=number)) for number, prompt in enumerate(PROMPTS)]
    company = asyncio.run(together(engine, *others, (PROMPTS[3], DRAWN), *others))
    assert ids(company[len(PROMPTS)]) == ids(alone)
    assert len({tuple(ids(tokens)) for tokens in company[: len(PROMPTS)]}) > 1
    assert ids(asyncio.run(written(engine, PROMPTS[3], replace(DRAWN, seed=8)))) != ids(alone)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_a_plain_forward_pass(engine: TransformersEngine, temperature: float) -> None:
    asked = Sampling(12, temperature, frequency_penalty=0.5, seed=3, top_logprobs=3)
    found, *_ = asyncio.run(together(engine, (PROMPTS[2], asked), (PROMPTS[4], Sampling(12))))
    whole = [*PROMPTS[2], *ids(found)]
    with torch.no_grad():
        logits = model_of(engine.kind)(input_ids=torch.tensor([whole])).logits[0]  # type: ignore[attr-defined]
    expected = logits[len(PROMPTS[2]) - 1 : -1].log_softmax(1)
    for token, row in zip(found, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [number for number, _ in token.top] == row.topk(3).indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_drawn_tokens_follow_the_softmax(engine: TransformersEngine) -> None:
    temperature, draws = 2.0, 400
    with torch.no_grad():
        logits = model_of(engine.kind)(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]  # type: ignore[attr-defined]
    expected = (logits / temperature).softmax(0) * draws
    asked = [(PROMPTS[1], Sampling(1, temperature, seed=seed)) for seed in range(draws)]
    counts = Counter(tokens[0].id for tokens in asyncio.run(together(engine, *asked)))
    likely = [number for number in range(VOCABULARY) if expected[number] > 8]
    rest = draws - sum(counts[number] for number in likely), draws - float(expected[likely].sum())
    pairs = [*((counts[number], float(expected[number])) for number in likely), rest]
    freedom = len(pairs) - 1
    assert freedom >= 3
    statistic = sum((seen - due) ** 2 / due for seen, due in pairs)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four deviations above the mean of chi-square


def test_penalties_make_an_answer_repeat_itself_less(engine: TransformersEngine) -> None:
    plain, punished = asyncio.run(
        together(
            engine,
            (PROMPTS[1], Sampling(40, temperature=1e-6)),
            (PROMPTS[1], Sampling(40, presence_penalty=2.0, frequency_penalty=2.0)),
        )
    )
    assert len(set(ids(punished))) > len(set(ids(plain)))


def test_ids_out_of_range_are_refused_and_the_engine_goes_on(engine: TransformersEngine) -> None:
    for prompt in ([], [VOCABULARY], [-1]):
        with pytest.raises(ApiError, match="token ids from 0 to 96"):
            asyncio.run(written(engine, prompt, Sampling(1)))
    assert len(asyncio.run(written(engine, [5], Sampling(1)))) == 1
    assert engine.failure is None


def test_answers_that_do_not_fit_in_memory_are_set_back_and_are_the_same() -> None:
    model = model_of("llama", 256)
    memory = next(size for size in range(10_000, 10_000_000, 10_000) if _blocks(model, size) == 10)  # a context is 8
    small = TransformersEngine(model, TOKENIZER, concurrent=4, memory_bytes=memory)
    roomy = TransformersEngine(model_of("llama", 256), TOKENIZER, concurrent=4)
    small.stop_ids = roomy.stop_ids = ()
    asked = [(prompt, Sampling(200, temperature=0.8, seed=5)) for prompt in PROMPTS[:3]]
    asked.append((PROMPTS[3], Sampling(200, frequency_penalty=0.1, top_logprobs=1)))
    try:
        tight, wide = asyncio.run(together(small, *asked)), asyncio.run(together(roomy, *asked))
    finally:
        asyncio.run(small.close())
        asyncio.run(roomy.close())
    assert [ids(tokens) for tokens in tight] == [ids(tokens) for tokens in wide]
    assert all(len(tokens) == 200 for tokens in tight)


def _blocks(model: PreTrainedModel, memory: int) -> int:
    try:
        return cache_size(model.config, torch.float32, model.device, 256, 4, memory).blocks
    except CapacityError:
        return 0


def test_memory_that_is_too_small_for_one_answer_is_refused() -> None:
    config, cpu = model_of("llama", 256).config, torch.device("cpu")
    assert cache_size(config, torch.float32, cpu, 256, 4, 10**9).blocks == 4 * 8
    assert cache_size(config, torch.float32, cpu, 250, 4, 10**9).blocks == 4 * 8
    with pytest.raises(CapacityError, match="256 tokens needs"):
        cache_size(config, torch.float32, cpu, 256, 4, 100_000)


def test_a_cancelled_answer_frees_its_place_within_a_second(long: TransformersEngine) -> None:
    async def cancel() -> float:
        first = long.write([5, 6], Sampling(LONG - 10))
        await anext(first)
        second = asyncio.create_task(written(long, [7], Sampling(1)))
        await asyncio.sleep(0.3)
        assert not second.done()  # there is one place
        await first.aclose()
        start = time.monotonic()
        await second
        return time.monotonic() - start

    assert asyncio.run(cancel()) < 1
    assert long.busy() == 0
    assert not long._manager.output_router.output_queue.qsize()  # what was written after it is not kept


def test_a_task_that_is_cancelled_while_it_waits_frees_its_place_too(long: TransformersEngine) -> None:
    async def cancel() -> list[Token]:
        running = asyncio.create_task(written(long, [5, 6], Sampling(LONG - 10)))
        await asyncio.sleep(0.2)
        running.cancel()
        return await asyncio.wait_for(written(long, [7], Sampling(2)), 1)

    assert len(asyncio.run(cancel())) == 2


def test_a_slow_reader_gets_several_tokens_at_once(long: TransformersEngine) -> None:
    async def read() -> list[list[Token]]:
        found = []
        async with aclosing(long.write([5, 6], Sampling(60, top_logprobs=0))) as pieces:
            async for tokens in pieces:
                found.append(tokens)
                await asyncio.sleep(0.2)
        return found

    pieces = asyncio.run(read())
    alone = asyncio.run(written(long, [5, 6], Sampling(60)))
    assert max(map(len, pieces)) > 5
    assert [token.id for tokens in pieces for token in tokens] == ids(alone)


def test_readers_in_several_event_loops_get_their_own_answers(engine: TransformersEngine) -> None:
    expected = [asyncio.run(written(engine, prompt, DRAWN)) for prompt in PROMPTS[:4]]
    found: dict[int, list[Token]] = {}

    def read(number: int) -> None:
        found[number] = asyncio.run(written(engine, PROMPTS[number], DRAWN))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [ids(found[number]) for number in range(4)] == [ids(tokens) for tokens in expected]


def test_when_the_model_fails_every_answer_ends_with_an_error() -> None:
    model = model_of("llama", LONG)
    engine = TransformersEngine(model, TOKENIZER, concurrent=2)
    engine.stop_ids = ()

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    async def run() -> list[object]:
        tasks = [asyncio.create_task(written(engine, [number + 3], Sampling(LONG - 10))) for number in range(5)]
        await asyncio.sleep(0.3)
        assert engine.failure is None
        model.register_forward_pre_hook(fail)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    errors = asyncio.run(run())
    assert all(isinstance(error, ApiError) and error.status == 500 for error in errors)
    assert all("the device is gone" in str(error) for error in errors)
    assert "the device is gone" in (engine.failure or "")
    with pytest.raises(ApiError, match="the device is gone"):
        asyncio.run(written(engine, [5], Sampling(1)))
    assert engine.busy() == 0
    asyncio.run(engine.close())


def test_closing_ends_answers_with_an_error() -> None:
    engine = TransformersEngine(model_of("llama", LONG), TOKENIZER)
    engine.stop_ids = ()

    async def run() -> None:
        running = asyncio.create_task(written(engine, [5], Sampling(LONG - 10)))
        await asyncio.sleep(0.2)
        await engine.close()
        with pytest.raises(ApiError, match="engine failed"):
            await asyncio.wait_for(running, 5)

    asyncio.run(run())
    assert engine.failure == "it was closed"


def test_top_p_keeps_the_fewest_tokens_that_have_the_probability() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, kept in (
        (0.0, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 2, 3}),
        (0.999, {0, 1, 2, 3}),
    ):
        assert set(nucleus(scores, top_p).isfinite().nonzero()[:, 0].tolist()) == kept
    flat = torch.zeros(1000)
    assert int(nucleus(flat, 0.5).isfinite().sum()) in (500, 501)  # more than are looked at first


def test_draws_follow_the_softmax_within_the_nucleus() -> None:
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0]), 20_000
    generator = torch.Generator().manual_seed(3)
    asked = Sampling(1, temperature=0.8, top_p=0.95)
    counts = Counter(next_token(logits, asked, {}, generator).id for _ in range(draws))
    chances = (logits / 0.8).softmax(0)
    chances[chances.cumsum(0) - chances >= 0.95] = 0
    chances /= chances.sum()
    assert int((chances == 0).sum()) > 0
    for number, chance in enumerate(chances.tolist()):
        assert counts[number] / draws == pytest.approx(chance, abs=4 * (chance * (1 - chance) / draws) ** 0.5)


def test_penalties_are_taken_from_the_tokens_that_the_answer_has() -> None:
    logits = torch.tensor([5.0, 4.5, 3.0])
    once = Sampling(1, presence_penalty=1.0)
    each = Sampling(1, frequency_penalty=1.0, top_logprobs=1)
    generator = torch.Generator()
    assert next_token(logits, once, {}, generator).id == 0
    assert next_token(logits, once, {0: 1}, generator).id == 1
    assert next_token(logits, once, {0: 3, 1: 1}, generator).id == 0  # both lose 1
    told = next_token(logits, each, {0: 3, 1: 1}, generator)
    assert told.id == 1
    assert told.top == ((0, pytest.approx(float(logits.log_softmax(0)[0]))),)  # of the model, without penalties
    assert logits.tolist() == [5.0, 4.5, 3.0]


def test_a_temperature_next_to_zero_takes_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 1.001, -50.0])
    assert {next_token(logits, Sampling(1, temperature=1e-30), {}, generator).id for _ in range(50)} == {1}
