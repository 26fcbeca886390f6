"""What a Hugging Face folder answers to a certificate's prompts, with transformers alone.

T: tokens of an answer. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.certificate.record import Ask, Certificate, Record, Reply
from distft.errors import DataError


def replay(certificate: Certificate, folder: Path) -> list[Reply]:
    """The folder's replies, in the order of the records, in the dtype that its ``config.json`` names.

    Tokens are written by ``generate`` with the folder's own generation settings, without sampling. A prompt that
    becomes other ids than it should is not answered: there is nothing to compare.

    Args:
        certificate: What is asked.
        folder: That is safe to load (:func:`distft.model.files.check_folder`).

    Raises:
        DataError: transformers cannot load the folder.
    """
    import transformers

    classifies = certificate.kind == "classification"
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = kind.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    except Exception as error:  # the tokenizers library raises bare Exceptions
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the model cannot be loaded: {said[0]}", where=str(folder)) from error
    replies = [_read(tokenizer, record.ask) for record in certificate.records]
    right = [
        place
        for place, (record, reply) in enumerate(zip(certificate.records, replies, strict=True))
        if reply.ids == record.ask.ids
    ]
    asked = [certificate.records[place] for place in right]
    answers = _judged(model, asked) if classifies else _written(model, asked)
    for place, answer in zip(right, answers, strict=True):
        replies[place] = answer
    return replies


def _read(tokenizer: Any, ask: Ask) -> Reply:
    """The ids that the folder's tokenizer and template make of a prompt."""
    if ask.messages is None:
        ids = ask.ids if ask.prompt is None else tuple(tokenizer(ask.prompt)["input_ids"])
        return Reply(ids)
    try:
        conversation = [dict(message) for message in ask.messages]
        found = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # jinja's errors, and what templates raise themselves
        return Reply(refused=str(error))
    return Reply(tuple(found["input_ids"]))


def _judged(model: Any, records: Sequence[Record]) -> list[Reply]:
    import torch

    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    replies = []
    for record in records:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([record.ask.ids])).logits[0]
        chances = torch.log_softmax(logits.float(), dim=-1).tolist()
        replies.append(Reply(record.ask.ids, labels=dict(zip(names, chances, strict=True))))
    return replies


def _written(model: Any, records: Sequence[Record]) -> list[Reply]:
    """Answers to all prompts at once, padded on the left."""
    import torch

    if not records:
        return []
    width, limit = max(len(record.ask.ids) for record in records), max(record.limit for record in records)
    rows = [([0] * (width - len(ids)), list(ids)) for ids in (record.ask.ids for record in records)]
    output = model.generate(
        torch.tensor([padding + ids for padding, ids in rows]),
        attention_mask=torch.tensor([padding + [1] * len(ids) for padding, ids in rows]),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    stops = model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    replies = []
    for row, record in enumerate(records):
        tokens: list[int] = output.sequences[row, width:][: record.limit].tolist()
        stop = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        logprobs = [
            float(torch.log_softmax(output.logits[place][row].float(), dim=-1)[token])
            for place, token in enumerate(tokens)
        ]
        replies.append(Reply(record.ask.ids, None, tuple(tokens), tuple(logprobs), stop is not None))
    return replies
