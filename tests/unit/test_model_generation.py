"""Generation, on a tiny random model."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distft.errors import JobError, RunError
from distft.model import generate

from .tiny_models import CONFIGS, tokenizer


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    return tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")


def model(name: str) -> PreTrainedModel:
    config = CONFIGS[name]()
    config.vocab_size = 257
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def write(made: PreTrainedModel, letters: PreTrainedTokenizerFast, **changes: object) -> str:
    settings = {"prompt": "Once", "max_new_tokens": 12, "temperature": 0.0, "seed": 0, **changes}
    return "".join(generate(made, letters, settings.pop("prompt"), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox"])
def test_greedy_text_is_that_of_transformers(name: str, letters: PreTrainedTokenizerFast) -> None:
    made = model(name)
    ids = letters("Once", return_tensors="pt")["input_ids"]
    expected = made.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)[0, ids.shape[1] :]
    assert write(made, letters) == letters.decode(expected, skip_special_tokens=True)


def test_a_seed_fixes_the_draws(letters: PreTrainedTokenizerFast) -> None:
    made = model("llama")
    texts = [write(made, letters, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_at_the_end_of_text(letters: PreTrainedTokenizerFast) -> None:
    made = model("llama")
    text = "a" + "b" * 20
    with torch.no_grad():  # a model that says its input token's successor in a fixed text, then ends it

        def successor(input_ids: torch.Tensor, **_: object) -> transformers.modeling_outputs.CausalLMOutputWithPast:
            steps.append(int(input_ids.shape[1]))
            place = len(steps)
            target = letters.convert_tokens_to_ids(text[place]) if place < 5 else 0
            logits = torch.zeros(1, 1, 257)
            logits[0, 0, target] = 9
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

        steps: list[int] = []
        made.forward = successor
        assert write(made, letters, prompt="a") == "bbbb"
    assert steps == [1, 1, 1, 1, 1]


def test_a_character_of_several_tokens_comes_whole(letters: PreTrainedTokenizerFast) -> None:
    from distft.model.generation import _decode

    ids = letters("a€😀b")["input_ids"]
    assert list(_decode(letters, iter(ids))) == ["a", "€", "😀", "b"]
    assert list(_decode(letters, iter(ids[:3]))) == ["a", "\ufffd"]  # cut off in the middle of €: said, not swallowed


def test_an_empty_prompt_begins_a_document(letters: PreTrainedTokenizerFast) -> None:
    assert write(model("llama"), letters, prompt="") == write(model("llama"), letters, prompt="<|endoftext|>")


def test_the_context_is_never_exceeded(letters: PreTrainedTokenizerFast) -> None:
    made = model("gpt2")
    pieces = list(generate(made, letters, "x" * 60, max_new_tokens=50, temperature=0.0, seed=0))
    assert 0 < len(pieces) <= 4
    with pytest.raises(JobError, match="64"):
        write(made, letters, prompt="x" * 64)


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_numbers_out_of_range_are_refused(change: dict[str, float], letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(JobError):
        write(model("llama"), letters, **change)


def test_a_damaged_model_is_said_to_be(letters: PreTrainedTokenizerFast) -> None:
    made = model("llama")
    with torch.no_grad():
        made.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        write(made, letters)
