"""Generation, on a tiny random model."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distft.errors import JobError, RunError
from distft.model import answers, batches, generate
from distft.model.generation import BATCH_PROMPTS

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


PROMPTS = ["Once upon a time", "a", "The union", "Once upon", "of our people and the roads", "b", "c"]


def ids_of(letters: PreTrainedTokenizerFast) -> list[list[int]]:
    return [letters(prompt)["input_ids"] for prompt in PROMPTS]


def stopping(made: PreTrainedModel) -> PreTrainedTokenizerFast:
    """A tokenizer whose end of turn is a letter that the model writes in some of its answers and not in others."""
    plain = tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")
    written = [set(answer.ids) for answer in answers(made, plain, ids_of(plain), 12)]
    some = {token for ids in written for token in ids if not all(token in others for others in written)}
    return tokenizer(["<|endoftext|>"], eos_token=plain.convert_ids_to_tokens(min(some)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_batch_of_answers_equals_one_prompt_at_a_time(name: str) -> None:
    made = model(name)
    letters = stopping(made)
    prompts = ids_of(letters)
    together = answers(made, letters, prompts, 12)
    assert together == [answers(made, letters, [prompt], 12)[0] for prompt in prompts]
    texts = ["".join(generate(made, letters, prompt, max_new_tokens=12, temperature=0, seed=0)) for prompt in prompts]
    assert [letters.decode(answer.ids) for answer in together] == texts
    assert {answer.stopped for answer in together} == {True, False}
    assert all(len(answer.ids) == 12 for answer in together if not answer.stopped)
    assert all(not {0, letters.eos_token_id} & set(answer.ids) for answer in together)


def test_batches_do_not_depend_on_who_answers_them(letters: PreTrainedTokenizerFast) -> None:
    made, prompts = model("llama"), ids_of(letters) * 6
    dealt = batches([len(prompt) for prompt in prompts], 12)
    assert sorted(number for batch in dealt for number in batch) == list(range(len(prompts)))
    assert max(map(len, dealt)) == BATCH_PROMPTS
    assert [len(prompts[batch[0]]) for batch in dealt] == sorted((len(prompts[b[0]]) for b in dealt), reverse=True)
    written = []
    for workers in (1, 2, 3):
        shares = [dealt[worker::workers] for worker in range(workers)]
        found = {
            number: answer
            for share in shares
            for batch in share
            for number, answer in zip(
                batch, answers(made, letters, [prompts[number] for number in batch], 12), strict=True
            )
        }
        written.append([found[number] for number in range(len(prompts))])
    assert written[0] == written[1] == written[2]


def test_batches_bound_their_tokens() -> None:
    dealt = batches([3000, 10, 4000, 100, 3900, *[20] * 40], 1000)
    assert dealt[0] == [2, 4, 0]  # a fourth would be 20,000 tokens
    assert all(len(batch) <= BATCH_PROMPTS for batch in dealt)
    assert batches([100_000], 10) == [[0]]
    assert batches([], 10) == []


def test_an_answer_ends_where_the_context_does(letters: PreTrainedTokenizerFast) -> None:
    """GPT-2 has an embedding for each of 64 positions: one more would fail."""
    made = model("gpt2")
    prompts = [letters("x" * length)["input_ids"] for length in (60, 64, 5, 70, 60)]
    found = answers(made, letters, prompts, 8)
    assert [len(answer.ids) for answer in found if not answer.stopped] == [4, 0, 8, 0, 4]


def test_the_models_own_settings_of_generation_are_left_alone(letters: PreTrainedTokenizerFast) -> None:
    """Hub models bring settings such as a repetition penalty, which would make it another thing than greedy."""
    made, prompts = model("llama"), ids_of(letters)
    expected = answers(made, letters, prompts, 12)
    own = transformers.GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=3.0, num_beams=2)
    made.generation_config = own
    assert answers(made, letters, prompts, 12) == expected
    assert made.generation_config is own
