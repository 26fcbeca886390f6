"""Labels of texts, by a classifier in this process. K labels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distft.model import DTYPES, Batch, LossModel, batches, context_of, load_classifier, load_tokenizer, pad_id
from distft.model.files import check_folder
from distft.serving.protocol import ApiError, Judgement
from distft.task.encoder import Encoder, fast_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class _Text:
    """A text's ids, and a place for its label, which its last token predicts."""

    input_ids: NDArray[np.int32]

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """Only the label's place."""
        return np.append(np.zeros(len(self.input_ids) - 1, dtype=np.bool_), True)

    @property
    def segments(self) -> tuple[int, ...]:
        """One."""
        return (len(self.input_ids),)


class Classifier:
    """A model with a head of labels.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._device, self._pad = LossModel(model).eval(), model.device, pad_id(tokenizer)
        self._encoder = Encoder(fast_tokenizer(tokenizer))
        self._worker = ThreadPoolExecutor(1, "classifier")  # one batch at a time, beside the event loop
        self.labels = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
        self.context = context_of(model)

    @classmethod
    def load(cls, folder: Path, dtype: str, *, device: str | None = None) -> Classifier:
        """The classifier of a Hugging Face folder.

        Args:
            folder: With weights in safetensors and no code of its own.
            dtype: "bf16" or "fp32".
            device: As torch names it; None: a GPU where there is one.

        Raises:
            DataError: The folder is not such a one.
        """
        check_folder(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_classifier(folder, DTYPES[dtype])
        return cls(model.to(device), load_tokenizer(folder))

    async def classify(self, texts: Sequence[str]) -> list[Judgement]:
        """The labels of some texts; a text's does not depend on the others.

        Raises:
            ApiError: 400 where a text is empty or too long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._judgements, tuple(texts))

    async def close(self) -> None:
        """Lets go of the model once the texts that wait are done."""
        await asyncio.to_thread(self._worker.shutdown)

    def _judgements(self, texts: Sequence[str]) -> list[Judgement]:
        encoded = [np.array([*ids, 0], dtype=np.int32) for ids, _ in self._encoder.encode(texts)]
        for place, ids in enumerate(encoded):
            self._check(len(ids) - 1, place)
        result: dict[int, Judgement] = {}
        for group in batches([len(ids) for ids in encoded], 0):
            rows = [_Text(encoded[place]) for place in group]
            with torch.inference_mode():
                batch = Batch.collate(rows, self._pad).to(self._device)
                found = self._model.class_log_probabilities(batch).exp().tolist()
            for place, chances in zip(group, found, strict=True):
                named = dict(zip(self.labels, chances, strict=True))
                result[place] = Judgement(max(named, key=named.__getitem__), named, len(encoded[place]) - 1)
        return [result[place] for place in range(len(texts))]

    def _check(self, tokens: int, place: int) -> None:
        if tokens == 0:
            raise ApiError(400, f"text {place + 1} is empty", param="input")
        if self.context is not None and tokens >= self.context:
            raise ApiError(
                400,
                f"text {place + 1} has {tokens} tokens; the model reads {self.context - 1}",
                code="context_length_exceeded",
                param="input",
            )
