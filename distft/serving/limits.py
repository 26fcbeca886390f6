"""How much one server, one key and one request may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server, one key and one request may take.

    Attributes:
        body_bytes: Of a request's body.
        body_seconds: Until a body has arrived.
        prompts: In one request.
        prompt_tokens: In a prompt that is given as token ids.
        n: Answers to each prompt.
        answers: Answers to all prompts of one request together.
        stop: Texts that end an answer.
        stop_characters: In each of them.
        top_logprobs: Likeliest tokens that are told at each place.
        messages: In one conversation.
        texts: To classify in one request.
        new_tokens: In one answer.
        seconds: For a request, from its arrival to its last byte.
        running: Requests that are answered at the same time.
        waiting: Requests that wait for one of them to end; those beyond get 429.
        quiet_seconds: A stream without news is kept open by a comment this often.
        requests_per_minute: Of each key; None is no limit.
        tokens_per_minute: Of each key, read and written; None is no limit.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    prompts: int = 16
    prompt_tokens: int = 131_072
    n: int = 8
    answers: int = 32
    stop: int = 4
    stop_characters: int = 128
    top_logprobs: int = 20
    messages: int = 256
    texts: int = 64
    new_tokens: int = 4096
    seconds: float = 300.0
    running: int = 64
    waiting: int = 64
    quiet_seconds: float = 10.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
