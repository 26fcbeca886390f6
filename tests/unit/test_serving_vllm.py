"""The engine over vLLM: the same tokens as plain generation, alone and in company. Skipped where vLLM is not installed.

One engine serves all tests of the module: it takes processes of its own, and seconds to start.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distft.errors import CapacityError, JobError, RunError
from distft.model import answers
from distft.serving import vllm_engine
from distft.serving.cache_size import vllm_bytes
from distft.serving.models import refuse_other_engine
from distft.serving.protocol import ApiError, Model, Sampling, Token
from distft.serving.replica import proven
from distft.serving.vllm_engine import VllmEngine, refuse_absent

from .test_certificate import LORA, Made, Make, copy, make, scale, written_home  # noqa: F401 - two are fixtures
from .tiny_models import CONFIGS, VOCABULARY, tokenizer

os.environ |= {"VLLM_CPU_CI_ENV": "1", "TORCH_COMPILE_DISABLE": "1"}  # compiling takes longer than all of these
absent = importlib.util.find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(absent, reason="vLLM is not installed (the extra vllm)")
TOKENIZER = tokenizer(["<|endoftext|>", "<s>", "</s>"], eos_token="</s>", bos_token="<s>")
PROMPTS = [[5 + 7 * number, *range(number + 3, 3 * number + 6)] for number in range(8)]
DRAWN = Sampling(24, temperature=0.9, top_p=0.9, seed=7)
CONTEXT = 4096


def model_of() -> PreTrainedModel:
    """Random weights, large enough that its logits differ clearly; heads as wide as vLLM's kernels want them."""
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim, config.max_position_embeddings = 128, 32, CONTEXT
    config.initializer_range = 0.2
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vllm")
    model_of().save_pretrained(made)
    TOKENIZER.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    made = VllmEngine(folder, "fp32", concurrent=4)
    yield made
    asyncio.run(made.close())


async def written(engine: VllmEngine, prompt: list[int], sampling: Sampling) -> list[Token]:
    return [token async for tokens in engine.write(prompt, sampling) for token in tokens]


async def together(engine: VllmEngine, *asked: tuple[list[int], Sampling]) -> list[list[Token]]:
    return await asyncio.gather(*(written(engine, prompt, sampling) for prompt, sampling in asked))


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.skipif(not absent, reason="vLLM is installed")
def test_where_vllm_is_not_installed_the_error_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"pip install 'distft\[vllm\]'"):
        VllmEngine(tmp_path, "fp32")
    with pytest.raises(CapacityError, match="not installed here"):
        refuse_absent()


def test_memory_for_vllm_is_what_its_answers_need_or_what_there_is() -> None:
    config = CONFIGS["llama"]()
    page = 128 * 2 * 2 * 8 * 4 * 2  # tokens, keys and values, heads, width, bytes, layers
    assert vllm_bytes(config, torch.float32, 64, 16, 10**9) == 17 * page
    assert vllm_bytes(config, torch.float32, 64, 16, 5 * page) == 5 * page
    with pytest.raises(CapacityError, match="an answer of 129 tokens needs"):
        vllm_bytes(config, torch.float32, 129, 16, 2 * page)


def test_a_classifier_is_refused_before_anything_is_loaded() -> None:
    judge = Model("judge", "classification", 0, 64, chat=False)
    with pytest.raises(JobError, match="tells no labels"):
        refuse_other_engine(judge, "vllm")
    refuse_other_engine(judge, "auto")
    refuse_other_engine(replace(judge, kind="generation"), "vllm")


def test_threads_are_bound_to_cores_only_where_no_other_replica_would_be_bound_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(cores)))
    assert vllm_engine._cores() == ",".join(map(str, cores))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert vllm_engine._cores() == ",".join(map(str, cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert vllm_engine._cores() == "1,3,5"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert vllm_engine._cores() == "nobind"


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the engine's threads only hand out work")
def test_the_engines_threads_give_way_to_those_that_speak_for_it(engine: VllmEngine) -> None:
    asyncio.run(written(engine, PROMPTS[0], Sampling(2)))
    computing = [one for one in psutil.Process().children() if one.name().startswith("VLLM::")]
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert computing
    for process in computing:
        found = {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()}
        assert found == {min(own + 4, 19)}


@needs_vllm
def test_greedy_answers_in_company_are_those_of_generate(engine: VllmEngine) -> None:
    model = model_of()
    expected = [answers(model, TOKENIZER, [prompt], 30)[0] for prompt in PROMPTS]
    found = asyncio.run(together(engine, *((prompt, Sampling(30)) for prompt in PROMPTS), (PROMPTS[0], DRAWN)))
    for one, tokens in zip(expected, found, strict=False):
        assert ids(tokens[:-1] if one.stopped else tokens) == list(one.ids)
        assert (tokens[-1].id in engine.stop_ids) == one.stopped
    assert engine.busy() == 0
    assert engine.context == CONTEXT


@needs_vllm
def test_an_answer_ends_after_a_stop_id_and_only_there(engine: VllmEngine) -> None:
    whole = ids(asyncio.run(written(engine, PROMPTS[2], Sampling(20))))
    stops, engine.stop_ids = engine.stop_ids, (whole[5],)
    try:
        assert ids(asyncio.run(written(engine, PROMPTS[2], Sampling(20)))) == whole[: whole.index(whole[5]) + 1]
    finally:
        engine.stop_ids = stops


@needs_vllm
def test_a_seed_repeats_alone_and_in_company(engine: VllmEngine) -> None:
    alone = asyncio.run(written(engine, PROMPTS[3], DRAWN))
    others = [(prompt, replace(DRAWN, seed=number)) for number, prompt in enumerate(PROMPTS)]
    company = asyncio.run(together(engine, *others, (PROMPTS[3], DRAWN), *others))
    assert ids(company[len(PROMPTS)]) == ids(alone)
    assert len({tuple(ids(tokens)) for tokens in company[: len(PROMPTS)]}) > 1
    assert ids(asyncio.run(written(engine, PROMPTS[3], replace(DRAWN, seed=8)))) != ids(alone)
    largest = replace(DRAWN, seed=2**63 - 1)
    assert ids(asyncio.run(written(engine, PROMPTS[3], largest))) == ids(
        asyncio.run(written(engine, PROMPTS[3], largest))
    )


@needs_vllm
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_a_plain_forward_pass(engine: VllmEngine, temperature: float) -> None:
    asked = Sampling(12, temperature, frequency_penalty=0.5, seed=3, top_logprobs=3)
    found, _, bare = asyncio.run(
        together(engine, (PROMPTS[2], asked), (PROMPTS[4], Sampling(12)), (PROMPTS[2], replace(asked, top_logprobs=0)))
    )
    whole = [*PROMPTS[2], *ids(found)]
    with torch.no_grad():
        logits = model_of()(input_ids=torch.tensor([whole])).logits[0]
    expected = logits[len(PROMPTS[2]) - 1 : -1].log_softmax(1)
    for token, row in zip(found, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [number for number, _ in token.top] == row.topk(3).indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert [(token.id, token.top) for token in bare] == [(token.id, ()) for token in found]


@needs_vllm
def test_penalties_and_an_empty_nucleus_are_followed(engine: VllmEngine) -> None:
    plain, punished, likeliest = asyncio.run(
        together(
            engine,
            (PROMPTS[1], Sampling(40)),
            (PROMPTS[1], Sampling(40, presence_penalty=2.0, frequency_penalty=2.0)),
            (PROMPTS[1], Sampling(40, temperature=1.5, top_p=0.0)),
        )
    )
    assert len(set(ids(punished))) > len(set(ids(plain)))
    assert ids(likeliest) == ids(plain)


@needs_vllm
def test_ids_out_of_range_are_refused_and_the_engine_goes_on(engine: VllmEngine) -> None:
    for prompt in ([], [VOCABULARY], [-1]):
        with pytest.raises(ApiError, match="token ids from 0 to 96"):
            asyncio.run(written(engine, prompt, Sampling(1)))
    assert len(asyncio.run(written(engine, [5], Sampling(1)))) == 1
    assert engine.failure is None


@needs_vllm
@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_answers_that_nobody_waits_for_free_their_places_within_a_second(engine: VllmEngine, how: str) -> None:
    """All four places are taken by answers of thousands of tokens; then a fifth is asked for."""
    stops, engine.stop_ids = engine.stop_ids, ()

    async def run() -> float:
        asked = Sampling(CONTEXT - 10)
        if how == "closed":
            streams = [engine.write([number + 5], asked) for number in range(4)]
            for stream in streams:
                await anext(stream)
        else:
            tasks = [asyncio.create_task(written(engine, [number + 5], asked)) for number in range(4)]
            await asyncio.sleep(1)
        fifth = asyncio.create_task(written(engine, [7], Sampling(1)))
        await asyncio.sleep(0.3)
        assert not fifth.done()
        start = time.monotonic()
        if how == "closed":
            for stream in streams:
                await stream.aclose()
        else:
            for task in tasks:
                task.cancel()
        await fifth
        return time.monotonic() - start

    try:
        seconds = asyncio.run(run())
    finally:
        engine.stop_ids = stops
    print(f"free after {seconds:.2f} s")
    assert seconds < 1
    assert engine.busy() == 0


@needs_vllm
def test_a_slow_reader_gets_several_tokens_at_once(engine: VllmEngine) -> None:
    async def read() -> list[list[Token]]:
        found = []
        async for tokens in engine.write([5, 6], Sampling(60, top_logprobs=0)):
            found.append(tokens)
            await asyncio.sleep(1)
        return found

    pieces = asyncio.run(read())
    assert max(map(len, pieces)) > 1
    assert [token.id for tokens in pieces for token in tokens] == ids(
        asyncio.run(written(engine, [5, 6], Sampling(60)))
    )


@needs_vllm
def test_readers_in_several_event_loops_get_their_own_answers(engine: VllmEngine) -> None:
    expected = [asyncio.run(written(engine, prompt, DRAWN)) for prompt in PROMPTS[:4]]
    found: dict[int, list[Token]] = {}

    def read(number: int) -> None:
        found[number] = asyncio.run(written(engine, PROMPTS[number], DRAWN))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [ids(found[number]) for number in range(4)] == [ids(tokens) for tokens in expected]


@needs_vllm
def test_when_its_process_dies_every_answer_ends_with_an_error_and_closing_ends_the_rest(folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = VllmEngine(folder, "fp32", concurrent=2)
    engine.stop_ids = ()
    started = set(psutil.Process().children(recursive=True)) - before

    async def run() -> list[object]:
        tasks = [asyncio.create_task(written(engine, [number + 3], Sampling(CONTEXT - 10))) for number in range(4)]
        await asyncio.sleep(1)
        assert engine.failure is None
        (core,) = [process for process in started if "EngineCore" in process.name() + " ".join(process.cmdline())]
        core.kill()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    errors = asyncio.run(run())
    assert all(isinstance(error, ApiError) and error.status == 500 for error in errors), errors
    assert "ended" in (engine.failure or "")
    with pytest.raises(ApiError, match="engine failed"):
        asyncio.run(written(engine, [5], Sampling(1)))
    asyncio.run(engine.close())
    assert engine.failure == "it was closed"
    _, alive = psutil.wait_procs(started, 20)
    assert not [process for process in alive if process.is_running() and "python" in process.name()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make`` trains, with heads as wide as vLLM's kernels want them."""
    return written_home(tmp_path_factory.mktemp("certified"), hidden_size=128, head_dim=32)


@needs_vllm
@pytest.mark.usefixtures("module_cache")
@pytest.mark.parametrize(("task", "adapter"), [("chat", None), ("plain", LORA)])
def test_what_was_trained_is_proved_over_http(task: str, adapter: dict[str, int] | None, make: Make) -> None:  # noqa: F811
    made = make(task, adapter)
    service, proof = proven("tiny", made.folder, engine="vllm", max_new_tokens=64, concurrent=4, waiting=4)
    print(proof)
    assert "prompts with equal ids" in proof
    assert "stops" in proof
    asyncio.run(service.close())


@needs_vllm
@pytest.mark.usefixtures("module_cache")
def test_a_scaled_tensor_is_refused(make: Make, copy: Callable[[Made], Path]) -> None:  # noqa: F811
    damaged = copy(make("chat"))
    scale(damaged)
    with pytest.raises(RunError, match=r"not the model that was trained; weights: 1 of \d+ tensors"):
        proven("tiny", damaged, engine="vllm", max_new_tokens=64, concurrent=4, waiting=4)


ORPHANS = """
import sys, time
from pathlib import Path
from distft.serving.vllm_engine import VllmEngine

if __name__ == "__main__":
    engine = VllmEngine(Path(sys.argv[1]), "fp32", concurrent=2)
    print("up", flush=True)
    time.sleep(600)
"""


@needs_vllm
def test_vllms_processes_end_when_the_one_that_started_them_is_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    command = [sys.executable, tmp_path / "orphans.py", folder]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    started = psutil.Process(owner.pid).children(recursive=True)
    assert len(started) >= 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs(started, 30)
    assert not alive
