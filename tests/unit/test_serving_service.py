"""The service over real engines: prompts as training made them, limits, several answers, stop strings, labels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distft.errors import DataError, RunError
from distft.model import stop_ids
from distft.serving.classifier import Classifier
from distft.serving.prompts import Prompts
from distft.serving.protocol import ApiError, Delta, Model, Question, Sampling
from distft.serving.service import Judge, LocalService, Writer
from distft.serving.transformers_engine import TransformersEngine
from distft.task.template import ChatTemplate

from .tiny_models import SHAPE, tokenizer

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER = tokenizer(SPECIAL, template=CHAT, bos_token="<|im_start|>", eos_token="<|im_end|>")
VOCABULARY = len(TOKENIZER)
CONTEXT, MOST_NEW, MOST = 128, 40, 6
LABELS = ("calm", "storm", "fog")
HELLO = ({"role": "user", "content": "Hello é"},)


def config() -> transformers.LlamaConfig:
    shape = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    return transformers.LlamaConfig(**shape, initializer_range=0.4)


def model_of(seed: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config()).eval()


def classifier_of() -> PreTrainedModel:
    made = config()
    made.num_labels, made.id2label = len(LABELS), dict(enumerate(LABELS))
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_config(made).eval()


def described(name: str, kind: str) -> Model:
    return Model(name, kind, 1, 10**6, chat=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    engine = TransformersEngine(model_of(), TOKENIZER, concurrent=4)
    judge = Judge(described("judge", "classification"), Classifier(classifier_of(), TOKENIZER))
    made = LocalService([Writer(described("poet", "generation"), engine), judge], max_new_tokens=MOST_NEW, most=MOST)
    yield made
    asyncio.run(made.close())


async def pieces(service: LocalService, question: Question) -> list[Delta]:
    return [piece async for piece in service.answer(question)]


def ask(service: LocalService, question: Question) -> list[Delta]:
    return asyncio.run(pieces(service, question))


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def ids_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token.id for delta in deltas if delta.index == index for token in delta.tokens]


def expected(prompt: tuple[int, ...], tokens: int) -> list[int]:
    """What the model writes after a prompt, with the id that ends it."""
    with torch.no_grad():
        written = model_of().generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stop_ids(TOKENIZER)
        )
    return written[0, len(prompt) :].tolist()


def refused(service: LocalService, question: Question) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(service, question)
    return caught.value


def test_a_chat_is_read_as_training_read_it_and_answered(service: LocalService) -> None:
    text = "<|im_start|>user\nHello é<|im_end|><|im_start|>assistant\n"
    prompt = tuple(TOKENIZER(text)["input_ids"])
    found = ask(service, Question("poet", messages=HELLO, sampling=Sampling(12), ids=True))
    assert found[0].prompt_ids == prompt
    assert found[0].prompt_tokens == len(prompt)
    assert [delta.prompt_ids for delta in found[1:]] == [None] * (len(found) - 1)
    written = expected(prompt, 12)
    assert ids_of(found) == written
    assert sum(delta.new_tokens for delta in found) == len(written)
    assert text_of(found) == TOKENIZER.decode(written, skip_special_tokens=True)
    assert [delta.finish for delta in found if delta.finish] == [found[-1].finish]
    assert found[-1].finish == ("stop" if written[-1] in stop_ids(TOKENIZER) else "length")


def test_texts_and_ids_are_gone_on_with_and_echoed(service: LocalService) -> None:
    ids = tuple(TOKENIZER("The wind")["input_ids"])
    asked = Question("poet", prompts=("The wind", ids, ""), sampling=Sampling(6), echo=True, ids=True)
    found = ask(service, asked)
    written = TOKENIZER.decode(expected(ids, 6), skip_special_tokens=True)
    assert text_of(found, 0) == text_of(found, 1) == "The wind" + written
    firsts = {delta.index: delta.prompt_ids for delta in found if delta.prompt_ids is not None}
    assert firsts == {0: ids, 1: ids, 2: (0,)}  # nothing is the beginning of a document
    assert text_of(ask(service, replace(asked, echo=False))) == written


def test_several_answers_have_seeds_after_the_first(service: LocalService) -> None:
    sampling = Sampling(10, temperature=1.0, seed=11)
    found = ask(service, Question("poet", prompts=("a", "b"), n=2, sampling=sampling, ids=True))
    alone = [
        ask(
            service,
            Question("poet", prompts=(prompt,), sampling=replace(sampling, seed=11 + index), ids=True),
        )
        for index, prompt in enumerate("aabb")
    ]
    assert [ids_of(found, index) for index in range(4)] == [ids_of(one) for one in alone]
    assert ids_of(found, 0) != ids_of(found, 1)
    assert sorted(delta.index for delta in found if delta.finish) == [0, 1, 2, 3]


def test_a_stop_string_ends_the_answer_and_frees_its_place(service: LocalService) -> None:
    asked = Question("poet", prompts=("Once",), sampling=Sampling(MOST_NEW), ids=True)
    whole = text_of(ask(service, asked))
    stop = whole[4:7]  # of several tokens, each a byte
    found = ask(service, replace(asked, stop=("never there", stop)))
    assert text_of(found) == whole[: whole.index(stop)]
    assert found[-1].finish == "stop"
    assert sum(delta.new_tokens for delta in found) == len(ids_of(found)) < MOST_NEW
    assert service._models["poet"].engine.busy() == 0  # type: ignore[union-attr]


def test_log_probabilities_are_told_with_the_bytes_of_tokens(service: LocalService) -> None:
    sampling = Sampling(5, top_logprobs=2)
    found = ask(service, Question("poet", prompts=("Once",), sampling=sampling))
    tokens = [token for delta in found for token in delta.tokens]
    spelling = {id: letters for delta in found for id, letters in delta.spelling.items()}
    assert all(token.logprob is not None and len(token.top) == 2 for token in tokens)
    assert {id for token in tokens for id, _ in token.top} <= spelling.keys()
    assert all(
        TOKENIZER(letters.decode())["input_ids"] == [id] for id, letters in spelling.items() if letters.isascii()
    )
    plain = ask(service, Question("poet", prompts=("Once",), sampling=Sampling(5)))
    assert not any(delta.tokens or delta.spelling for delta in plain)


def test_what_does_not_fit_is_refused_with_the_figures(service: LocalService) -> None:
    long = (5,) * (CONTEXT - 10)
    error = refused(service, Question("poet", prompts=(long,), sampling=Sampling(11)))
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert all(figure in error.message for figure in (f"{CONTEXT} tokens", f"{len(long)} tokens", "11 are asked for"))
    assert (
        sum(delta.new_tokens for delta in ask(service, Question("poet", prompts=(long,), sampling=Sampling(10)))) <= 10
    )
    full = refused(service, Question("poet", prompts=((5,) * CONTEXT,)))
    assert full.code == "context_length_exceeded"
    assert refused(service, Question("poet", prompts=("a",), sampling=Sampling(MOST_NEW + 1))).param == "max_tokens"


def test_no_limit_is_the_servers_or_the_room_that_is_left(service: LocalService) -> None:
    never = Sampling(0, presence_penalty=2.0, frequency_penalty=2.0)
    for length, most in ((CONTEXT - 7, 7), (3, MOST_NEW)):
        found = ask(service, Question("poet", prompts=((5,) * length,), sampling=never))
        written = sum(delta.new_tokens for delta in found)
        assert written == most or found[-1].finish == "stop"
        assert written <= most


def test_what_no_model_does_is_refused(service: LocalService) -> None:
    assert refused(service, Question("nobody", prompts=("a",))).status == 404
    assert refused(service, Question("judge", prompts=("a",))).status == 400
    assert refused(service, Question("poet", prompts=("\ud800",))).status == 400
    assert refused(service, Question("poet", prompts=((VOCABULARY,),))).status == 400
    with pytest.raises(ApiError, match="tells no labels"):
        asyncio.run(service.classify("poet", ["a"]))
    with pytest.raises(ApiError, match="nobody"):
        asyncio.run(service.classify("nobody", ["a"]))


def test_more_answers_than_may_wait_are_told_when_to_come_back(service: LocalService) -> None:
    question = Question("poet", prompts=("a",), n=3, sampling=Sampling(MOST_NEW, temperature=1.0))

    async def crowd() -> list[object]:
        results = await asyncio.gather(*(pieces(service, question) for _ in range(3)), return_exceptions=True)
        return [*results, await pieces(service, question)]  # later there is room

    *three, later = asyncio.run(crowd())
    errors = [one for one in three if isinstance(one, ApiError)]
    assert [(error.status, error.code) for error in errors] == [(429, "overloaded")]
    assert errors[0].retry_after is not None
    assert errors[0].retry_after >= 1
    assert isinstance(later, list)
    assert refused(service, replace(question, n=MOST + 1)).status == 400


def test_a_reader_who_leaves_frees_all_places(service: LocalService) -> None:
    async def leave() -> int:
        question = Question("poet", prompts=("a",), n=MOST, sampling=Sampling(MOST_NEW, temperature=1.0))
        async with aclosing(service.answer(question)) as answers:
            await anext(answers)
        found = await pieces(service, question)
        return len({delta.index for delta in found if delta.finish})

    assert asyncio.run(leave()) == MOST
    assert service._models["poet"].engine.busy() == 0  # type: ignore[union-attr]


def test_a_template_that_refuses_says_why_and_a_model_without_one_does_not_chat() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT
    prompts = Prompts(tokenizer(SPECIAL, template=strict, eos_token="<|im_end|>"))
    with pytest.raises(ApiError, match="no system here") as caught:
        prompts.of_chat([{"role": "system", "content": "x"}, *HELLO])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(ApiError, match="no chat template"):
        Prompts(tokenizer(SPECIAL, eos_token="<|im_end|>")).of_chat(HELLO)


def test_conversations_are_worded_as_in_training() -> None:
    template = ChatTemplate.of(TOKENIZER, stop_ids(TOKENIZER))
    assert template is not None
    turns = [{"role": role, "content": role[::-1]} for role in ("system", "user", "assistant", "user")]
    assert TOKENIZER.decode(Prompts(TOKENIZER).of_chat(turns)) == template.opening(turns)


def test_labels_are_those_of_transformers_own_classifier(service: LocalService) -> None:
    texts = ["no wind", "waves as high as houses é", "grey", "x" * 100]
    found = asyncio.run(service.classify("judge", texts))
    model = classifier_of()
    for text, judged in zip(texts, found, strict=True):
        ids = TOKENIZER(text)["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            chances = model.score(hidden).softmax(0).tolist()
        assert judged.probabilities == pytest.approx(dict(zip(LABELS, chances, strict=True)), abs=1e-5)
        assert judged.label == LABELS[chances.index(max(chances))]
        assert judged.tokens == len(ids)
        assert sum(judged.probabilities.values()) == pytest.approx(1)


def test_texts_that_cannot_be_judged_are_refused(service: LocalService) -> None:
    with pytest.raises(ApiError, match="text 2 is empty"):
        asyncio.run(service.classify("judge", ["a", ""]))
    with pytest.raises(ApiError, match=f"text 1 has 200 tokens; the model reads {CONTEXT - 1}"):
        asyncio.run(service.classify("judge", ["x" * 200]))


def test_models_say_what_they_are_and_a_failed_one_is_not_ready() -> None:
    engine = TransformersEngine(model_of(), TOKENIZER)
    one = LocalService([Writer(described("poet", "generation"), engine)], max_new_tokens=8, most=2)
    assert one.models() == [Model("poet", "generation", 1, CONTEXT, chat=True, ready=True)]
    one.check()
    asyncio.run(one.close())
    assert [model.ready for model in one.models()] == [False]
    with pytest.raises(RunError, match="poet"):
        one.check()


def test_a_saved_folder_is_served_and_one_that_could_run_code_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model_of().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    engine = TransformersEngine.load(folder, "fp32", concurrent=2, context=64, device="cpu")
    one = LocalService([Writer(described("poet", "generation"), engine)], max_new_tokens=8, most=2)
    prompt = tuple(TOKENIZER("Once")["input_ids"])
    assert ids_of(ask(one, Question("poet", prompts=("Once",), sampling=Sampling(8), ids=True))) == expected(prompt, 8)
    assert one.models()[0].context == 64
    asyncio.run(one.close())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickles"):
        TransformersEngine.load(folder, "fp32")
