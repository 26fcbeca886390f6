"""Prompts and responses: their words, their targets, and what becomes of those that are too long."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distft.config import Job, TaskSection
from distft.data.card import describe
from distft.data.example import Column
from distft.data.store import Prepared
from distft.errors import DataError
from distft.task.encoder import continuing, encoder
from distft.task.generation import Generation
from distft.task.prepare import prepare
from distft.task.presets import PRESETS, wording_of
from tests.unit.test_task_template import ONE, SYSTEM, TWO, marked, model, task_for
from tests.unit.tiny_models import tokenizer

END = "<|endoftext|>"


def plain() -> Any:
    return tokenizer([END, "<pad>"], eos_token=END, pad_token="<pad>")


PRESET_ROWS = [
    ("instruction", ("Say it", "", "Done"), "Say it", "Done"),
    ("instruction", ("Say it", "Hi", "Done"), "Say it\n\nHi", "Done"),
    ("translation", ("Yes", "Ja"), "Translate: Yes", "Ja"),
    ("summarization", ("A long\n\ntext", "Short"), "Summarize:\n\nA long\n\ntext", "Short"),
    ("question_answering", ("Sky is blue", "Colour?", "blue"), "Sky is blue\n\nColour?", "blue"),
    ("question_answering", ("", "Colour?", "blue"), "Colour?", "blue"),
]


@pytest.mark.parametrize(("preset", "values", "prompt", "response"), PRESET_ROWS)
def test_presets_word_a_row(preset: Any, values: tuple[str, ...], prompt: str, response: str) -> None:
    task = task_for(plain(), preset=preset)
    (example,) = task.encode([values])
    assert marked(plain(), example) == f"{prompt}\n\n«{response}{END}»"
    assert example.scored_bytes == len(response)
    assert task.facts["template"] == "plain text"
    (chat,) = task_for(model("llama3"), preset=preset).encode([values])
    assert f"user<|end_header_id|>\n\n{prompt}<|eot_id|>" in marked(model("llama3"), chat)


def test_columns_of_presets() -> None:
    task = task_for(plain(), preset="instruction")
    assert task.columns == (Column("instruction"), Column("input", optional=True), Column("output"))
    assert task_for(model("zephyr"), preset="chat").columns == (Column("messages", "messages"),)
    assert task_for(model("zephyr"), messages="talk").columns == (Column("talk", "messages"),)


def test_words_of_the_job_take_the_place_of_a_presets() -> None:
    task = task_for(plain(), preset="translation", prompt="{en} in {{German}}: ")
    assert task.columns == (Column("en"), Column("target"))
    assert marked(plain(), task.encode([("Yes {en}", "Ja")])[0]) == f"Yes {{en}} in {{German}}: «Ja{END}»"
    assert task.facts["prompt"] == "{en} in {{German}}: "


def test_wording_leaves_alone_what_is_not_optional() -> None:
    wording = wording_of(TaskSection(kind="generation", prompt="{a}\n\n{b}", response="{c}"), plain=True)
    assert wording is not None
    assert wording.worded({"a": "", "b": "x", "c": "y"}) == ("\n\nx", "y")
    assert wording_of(TaskSection(kind="generation", preset="chat"), plain=True) is None
    assert set(PRESETS) == {"instruction", "translation", "summarization", "question_answering"}


def test_the_longest_field_of_the_prompt_makes_room_for_the_response() -> None:
    task = task_for(plain(), prompt="{q}|{context}|", response="{a}", max_tokens=20, overlong="truncate")
    kept, cut = task.encode([("why", "because", "yes"), ("why", "0123456789" * 4, "yes, really")])
    assert (kept.fate, kept.cut) == ("kept", ())
    assert (cut.fate, cut.spans, cut.cut) == ("truncated", ((0, 20),), (("context", 37),))
    assert marked(plain(), cut) == f"why|012|«yes, really{END}»"
    assert cut.scored_bytes == len("yes, really")


def test_a_response_too_long_by_itself_loses_its_end_and_does_not_stop() -> None:
    task = task_for(plain(), prompt="{q}|", response="{a}", max_tokens=10, overlong="truncate")
    (example,) = task.encode([("why", "0123456789")])
    assert marked(plain(), example) == "|«012345678»"
    assert example.cut == (("q", 3), ("a", 2))
    assert example.scored_bytes == 9


def test_a_conversation_loses_its_end() -> None:
    made = model("llama3")
    (whole,) = task_for(made, preset="chat").encode([(json.dumps(TWO),)])
    tokens = len(whole.ids)
    for short, wanted in ((2, "«No»"), (6, "«Yes.<|eot_id|>»"), (tokens - 27, "«Ye»")):
        task = task_for(made, preset="chat", max_tokens=tokens - short, overlong="truncate")
        (example,) = task.encode([(json.dumps(TWO),)])
        assert (example.fate, example.cut) == ("truncated", (("messages", short),))
        assert wanted in marked(made, example)
    (example,) = task_for(made, preset="chat", max_tokens=8, overlong="truncate").encode([(json.dumps(ONE),)])
    assert (example.fate, example.spans) == ("no_target", ())


@pytest.mark.parametrize(("policy", "fate"), [("drop", "dropped"), ("error", "overlong")])
def test_what_is_too_long_is_left_out_whole(policy: str, fate: str) -> None:
    task = task_for(plain(), prompt="{q}|", response="{a}", max_tokens=8, overlong=policy)
    (example,) = task.encode([("why", "0123456789")])
    assert (example.fate, example.spans, example.cut, len(example.ids)) == (fate, (), (), 15)


@settings(max_examples=50, deadline=None)
@given(
    question=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    max_tokens=st.integers(2, 60),
)
def test_shortened_rows_fit_and_say_what_they_lost(question: str, answer: str, max_tokens: int) -> None:
    task = task_for(plain(), prompt="Q: {q}\n", response="{a}", max_tokens=max_tokens, overlong="truncate")
    whole = task_for(plain(), prompt="Q: {q}\n", response="{a}", max_tokens=10_000)
    (example,), (full,) = task.encode([(question, answer)]), whole.encode([(question, answer)])
    assert len(example.ids) <= max_tokens
    assert (example.fate == "kept") == (len(full.ids) <= max_tokens)
    if example.fate == "truncated":
        assert sum(tokens for _, tokens in example.cut) == len(full.ids) - len(example.ids)
        stops = example.ids[-1] == task.end_of_text
        assert stops == (dict(example.cut).get("a", 0) == 0)


def llama2() -> PreTrainedTokenizerFast:
    """A space before the first word of every text, as Llama 2 and Mistral 7B have it."""
    backend = Tokenizer(models.BPE(unk_token=None, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=40, show_progress=False)
    backend.train_from_iterator(["yes no maybe hi so [INST] [/INST]"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_an_answer_begins_with_no_space_of_the_tokenizers_own() -> None:
    made = llama2()
    made.chat_template = model("mistral").chat_template
    task = task_for(made, preset="chat")
    (example,) = task.encode([(json.dumps(ONE),)])
    answer = [made.convert_ids_to_tokens(int(token)) for token in example.ids[example.supervised]]
    assert "".join(answer) == "▁Yes.</s>" or answer[-1] == "</s>"
    assert made.decode(example.ids[example.supervised][:-1].tolist()) == " Yes."
    apart = encoder(continuing(task.tokenizer_json)).tokenizer.encode("yes").tokens
    assert "".join(apart) == "yes"
    assert "".join(encoder(task.tokenizer_json).tokenizer.encode("yes").tokens) == "▁yes"


@pytest.mark.parametrize(
    "step",
    [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=True)],
    ids=["metaspace", "byte level"],
)
def test_other_ways_to_put_a_space_first(step: Any) -> None:
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "Ġ": 1, "a": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), step])
    assert len(encoder(backend.to_str()).tokenizer.encode("a").ids) == 2
    assert encoder(continuing(backend.to_str())).tokenizer.encode("a").ids == [2]
    same = plain().backend_tokenizer.to_str()
    assert continuing(same) == same


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    from tokenizers import processors

    made = tokenizer(["</s>", "<s>"], eos_token="</s>", bos_token="<s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)]
    )
    (example,) = task_for(made, prompt="{q} ", response="{a}").encode([("why", "so")])
    assert marked(made, example) == "<s>why «so</s>»"


def test_no_rows_and_pickling() -> None:
    task = task_for(model("mistral"), preset="chat")
    assert task.encode([]) == []
    assert pickle.loads(pickle.dumps(task)) == task
    assert isinstance(task, Generation)


def job(folder: Path, name: str, rows: list[Any], **sections: Any) -> tuple[Job, Path]:
    model(name).save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": {"source": "model"},
        "task": {"kind": "generation", "preset": "chat"},
        "data": {"source": "rows.jsonl", "max_tokens": 128, "splits": {"validation": 0.2, "test": 0.2}},
        **sections,
    }
    return Job.from_values(values, folder), folder / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    rows = [{"messages": ONE}] * 4 + [{"messages": SYSTEM}] + [{"messages": TWO}]
    with pytest.raises(DataError, match="System role not supported") as caught:
        prepare(*job(tmp_path, "gemma", rows))
    assert caught.value.where == "rows.jsonl, line 5"


@pytest.mark.usefixtures("cache")
def test_rows_without_any_target_are_refused(tmp_path: Path) -> None:
    """Conversations in which nobody answers: there is nothing to learn, and training must not begin."""
    rows = [{"messages": [{"role": "user", "content": f"Question {number}?"}]} for number in range(10)]
    with pytest.raises(
        DataError, match=r"all \d+ documents of the train split were dropped or hold nothing to predict"
    ):
        prepare(*job(tmp_path, "llama3", rows))


@pytest.mark.usefixtures("cache")
def test_the_card_tells_what_the_template_adds_and_what_was_cut(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"Q{n}"}, {"from": "gpt", "value": "A" * n}]}
        for n in range(1, 40)
    ]
    data = {
        "source": "rows.jsonl",
        "max_tokens": 125,
        "overlong": "truncate",
        "splits": {"validation": 0.2, "test": 0.2},
    }
    task = {"kind": "generation", "messages": "conversations"}
    card = Prepared.open(prepare(*job(tmp_path, "smollm2", rows, data=data, task=task))).card
    assert card["task"]["adds"] == ["You are a helpful AI assistant named SmolLM, trained by Hugging Face"]
    assert sum(counts.get("truncated", 0) for counts in card["rows"].values()) > 0
    assert list(card["cut"]) == ["conversations"]
    assert "You are a helpful AI assistant" in describe(card)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("name", "taught"), [("qwen3", False), ("llama3", True)])
def test_the_card_counts_conversations_that_learn_their_last_answer_only(
    name: str, taught: bool, tmp_path: Path
) -> None:
    single, double = ONE, [*ONE, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, *(double if n % 3 == 0 else single)[1:]]} for n in range(30)
    ]
    card = Prepared.open(prepare(*job(tmp_path, name, rows))).card
    listed = [{"source": "rows.jsonl", "row": n + 1} for n in range(0, 15, 3)]
    expected = {"documents": 10, "answers": 10, "listed": listed}
    assert card["unlearnt"] == ({"documents": 0, "answers": 0, "listed": []} if taught else expected)
    line = (
        "last answer only: 10 conversations, because the template rewrites earlier turns (10 answers are not learnt): "
        "rows.jsonl row 1, rows.jsonl row 4, rows.jsonl row 7, ..."
    )
    assert (line in describe(card)) is not taught


def test_a_template_that_writes_the_beginning_of_text_gets_no_second_one() -> None:
    from tokenizers import processors

    made = model("llama3")
    begin = made.convert_tokens_to_ids("<|begin_of_text|>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    (example,) = task_for(made, preset="chat").encode([(json.dumps(ONE),)])
    assert example.ids.tolist().count(begin) == 1


def test_a_column_of_prompt_and_response_is_cut_in_neither() -> None:
    task = task_for(plain(), prompt="{q} {a}|", response="{a}!", max_tokens=14, overlong="truncate")
    (example,) = task.encode([("why", "because")])
    assert marked(plain(), example) == " because|«becau»"
    assert example.cut == (("q", 3), ("a", 4))


@pytest.mark.usefixtures("cache")
def test_another_template_is_other_data(tmp_path: Path) -> None:
    rows = [{"messages": TWO[:2]}, *({"messages": [{**ONE[0], "content": f"Q{n}"}, ONE[1]]} for n in range(9))]
    made, folder = job(tmp_path, "smollm2", rows)
    first = prepare(made, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("SmolLM", "Smaug"), encoding="utf-8")
    second = prepare(made, folder)
    assert second != first
    assert "Smaug" in Prepared.open(second).card["task"]["adds"][0]
