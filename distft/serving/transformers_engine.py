"""Tokens by transformers' continuous batching: answers join and leave the batch at every step.

Source: https://huggingface.co/docs/transformers/continuous_batching. The manager runs in a thread of its own; this
module sizes its memory, brings tokens to those who wait for them, and chooses each request's tokens as it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors, continuous_api

from distft.model import DTYPES, context_of, load_model, load_tokenizer, stop_ids
from distft.model.files import check_folder
from distft.model.mixed_adapters import Adapter, MixedAdapters
from distft.serving.cache_size import cache_size, free_memory
from distft.serving.protocol import ApiError, Sampling, Token
from distft.serving.sampling import next_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Of models whose configuration names none.
_CONTEXT = 4096


class _Answer:
    """An answer that is being written: the manager's thread writes, one asyncio task reads."""

    def __init__(self, sampling: Sampling, device: torch.device, adapter: Adapter | None) -> None:
        self.sampling, self.adapter = sampling, adapter
        self.loop = asyncio.get_running_loop()
        self.arrived = asyncio.Event()
        self.output: Any = None  # the manager's latest, which holds all tokens so far
        self.over = False
        self.plain = sampling == Sampling(sampling.max_new_tokens, seed=sampling.seed)
        self.written: list[Token] = []  # unless plain
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator(device)
        self._generator.manual_seed(sampling.seed)
        self._given = 0

    def choose(self, logits: Tensor) -> int:
        """The next token from logits (V,), kept with its log-probabilities."""
        token = next_token(logits, self.sampling, self._counts, self._generator)
        self._counts[token.id] += 1
        self.written.append(token)
        return token.id

    async def more(self) -> list[Token]:
        """What was written since the last call, at least one token.

        Raises:
            ApiError: The engine failed.
        """
        await self.arrived.wait()
        self.arrived.clear()
        output = self.output
        self.over = output.is_finished()
        if output.error is not None:
            raise _broken(output.error)
        ids = output.generated_tokens[self._given :]
        start, self._given = self._given, len(output.generated_tokens)
        return [Token(number) for number in ids] if self.plain else self.written[start : self._given]


def _broken(why: str) -> ApiError:
    return ApiError(500, f"the engine failed: {why}", type="server_error", code="engine_failed")


class _Chooser(cb_logits_processors.ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens of requests that are not plain; the manager then takes what was made the likeliest.

    It needs the tokens so far of each request (penalties) and Python at every step, so that neither batches made ahead
    of them nor CUDA graphs will do.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as its base has it
    ignored_kwargs = ()

    def __init__(self, answers: Mapping[str, _Answer]) -> None:
        self._answers = answers
        self._rows: list[tuple[int, _Answer]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing: what requests ask for is looked up."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Remembers whose rows of logits come next."""
        found = ((row, self._answers.get(one.state.request_id)) for row, one in enumerate(requests_with_new_token))
        self._rows = [(row, answer) for row, answer in found if answer is not None and not answer.plain]
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Makes each chosen token the likeliest of its row, of logits (rows, V)."""
        for row, answer in self._rows:
            scores[row, answer.choose(scores[row])] = torch.inf
        return scores


class _Processors(cb_logits_processors.ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The chooser alone; where adapters are mixed, they are told whose the tokens of the next forward pass are.

    The manager asks for arguments once a batch, with its requests in the order of their tokens.
    """

    def __init__(self, answers: Mapping[str, _Answer], mixed: MixedAdapters | None) -> None:
        super().__init__(LogitsProcessorList([_Chooser(answers)]))
        self.tensors_required = 1  # a line of its tensor of arguments, which it sizes by this
        self._answers, self._mixed = answers, mixed

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Any:
        """Looks at all requests of a batch, those too whose prompt is not at its end."""
        if self._mixed is not None:
            self._mixed.route([(self._adapter(one.state.request_id), one.query_length) for one in requests_in_batch])
        return super().prepare_tensor_args(requests_in_batch, arg_storage)

    def _adapter(self, request: str) -> Adapter | None:
        answer = self._answers.get(request)  # None: nobody waits for it any more
        return None if answer is None else answer.adapter


class _Router(continuous_api.OutputRouter):  # type: ignore[misc]
    """Brings the manager's outputs to those who wait; outputs that nobody waits for any more are dropped.

    The manager's own sends all to one event loop, and keeps what is written after a cancellation for ever.
    """

    def __init__(self, answers: Mapping[str, _Answer]) -> None:
        super().__init__()
        self._answers = answers
        self.why: str | None = None  # the manager tells it only after all answers have failed

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """An output that says that the manager failed."""
        self.why = str(error)
        super().fail_and_deliver(state, error)

    def deliver(self, output: Any) -> None:
        """One output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        """The outputs of a step: each loop is woken once."""
        waiting: dict[asyncio.AbstractEventLoop, list[_Answer]] = defaultdict(list)
        for output in outputs:
            if (answer := self._answers.get(output.request_id)) is not None:
                answer.output = output
                waiting[answer.loop].append(answer)
        for loop, answers in waiting.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: so nobody waits
                loop.call_soon_threadsafe(_wake, answers)


def _wake(answers: Sequence[_Answer]) -> None:
    for answer in answers:
        answer.arrived.set()


class TransformersEngine:
    """A causal language model that writes many answers at a time; see :class:`~.protocol.Engine`.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        concurrent: Answers that are written at the same time; more wait.
        context: Tokens of prompt and answer at most; the model's own where None.
        memory_bytes: What keys and values may take; None: a share of what is free on the device.
        adapted: Whether answers may each ask for an adapter.

    Raises:
        CapacityError: Not even one whole context fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        concurrent: int = 16,
        context: int | None = None,
        memory_bytes: int | None = None,
        adapted: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        most = context_of(model) or context or _CONTEXT
        self.context = min(context or most, most)
        self.stop_ids = tuple(stop_ids(tokenizer))
        self.dtype = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        self.model = model
        self._device, self._vocabulary = model.device, model.get_input_embeddings().num_embeddings
        self._answers: dict[str, _Answer] = {}
        self._numbers = itertools.count()
        memory = free_memory(model.device) if memory_bytes is None else memory_bytes
        size = cache_size(model.config.get_text_config(), model.dtype, model.device, self.context, concurrent, memory)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=list(self.stop_ids), pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=size.page_tokens,
                num_blocks=size.blocks,
                max_batch_tokens=size.batch_tokens,
                max_requests_per_batch=concurrent,
                allow_block_sharing=not adapted,  # equal prompts have other keys and values under another adapter
                use_async_batching=False,  # see _Chooser
                use_cuda_graph=False,
                auto_switch_to_flash=False,  # it would fetch kernels from the hub, and training's attention is SDPA
            ),
        )
        mixed = MixedAdapters(model) if adapted else None
        self._manager.logit_processor = _Processors(self._answers, mixed)
        self._router = self._manager.output_router = _Router(self._answers)
        self._closed = False
        self._manager.warmup()  # takes its memory here: what goes wrong is raised, and no thread seeds torch later
        # The manager's thread is a daemon if the one that starts it is: a process that forgets to close can still end.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: str,
        *,
        concurrent: int = 16,
        context: int | None = None,
        device: str | None = None,
        adapted: bool = False,
    ) -> TransformersEngine:
        """The engine of a Hugging Face folder.

        Args:
            folder: With weights in safetensors and no code of its own.
            dtype: "bf16" or "fp32".
            concurrent: As above.
            context: As above.
            device: As torch names it; None: a GPU where there is one.
            adapted: As above.

        Raises:
            DataError: The folder is not such a one.
            CapacityError: The device is too small.
        """
        check_folder(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_model(folder, DTYPES[dtype])
        tokenizer = load_tokenizer(folder)
        return cls(model.to(device), tokenizer, concurrent=concurrent, context=context, adapted=adapted)

    async def write(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[list[Token]]:
        """See :meth:`.protocol.Engine.write`; a slow reader gets several tokens at a time.

        Args:
            prompt: As there.
            sampling: As there.
            adapter: What this answer's tokens are adapted by; only where the engine was made for it.
            stop_ids: The ids that end this answer; None: the engine's own.
        """
        if not (prompt and 0 <= min(prompt) <= max(prompt) < self._vocabulary):  # on a GPU it would end the process
            raise ApiError(400, f"a prompt is one or more token ids from 0 to {self._vocabulary - 1}", param="prompt")
        name = str(next(self._numbers))
        answer = self._answers[name] = _Answer(sampling, self._device, adapter)
        try:
            self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=sampling.max_new_tokens,
                streaming=True,
                eos_token_id=list(self.stop_ids if stop_ids is None else stop_ids),
            )
            if (failure := self.failure) is not None:  # after the request: one that came too late is never answered
                raise _broken(failure)
            while not answer.over:
                yield await answer.more()
        finally:
            del self._answers[name]
            if not answer.over:
                self._manager.cancel_request(name)

    @property
    def failure(self) -> str | None:
        """Why it writes no more; None while it does."""
        status = self._manager.background_thread_status
        if self._manager.is_running() and status.can_accept_new_requests() is None:
            return None
        return "it was closed" if self._closed else str(self._router.why or status.fatal_error)

    def busy(self) -> int:
        """See :meth:`.protocol.Engine.busy`."""
        return len(self._answers)

    async def close(self) -> None:
        """See :meth:`.protocol.Engine.close`."""
        self._closed = True
        await asyncio.to_thread(self._manager.stop, block=True, hard_stop=True)
