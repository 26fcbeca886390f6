"""Chat templates of well-known models: what is context and what is learnt, token by token, written out by hand.

Legend: «...» are the targets. The tokenizer has one token for each letter and one for each special token.
"""

from __future__ import annotations

import datetime
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from distft.config import TaskSection
from distft.data.example import Example
from distft.errors import DataError
from distft.model import end_of_text_id, stop_ids
from distft.task.generation import Generation
from distft.task.template import ChatTemplate
from tests.unit.tiny_models import tokenizer

TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    },
    "llama3": {
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    },
    "mistral": {"special": ["<unk>", "<s>", "</s>"], "bos_token": "<s>", "eos_token": "</s>"},
    "gemma": {
        "special": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    },
    "zephyr": {"special": ["<unk>", "<s>", "</s>"], "bos_token": "<s>", "eos_token": "</s>"},
    "phi3": {
        "special": ["<|endoftext|>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
    },
    "qwen3": {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"},
}
MODELS["llama32"] = MODELS["llama3"]

SMOLLM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
TWO = [*ONE, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO]
THOUGHT = "<think>\n\n</think>\n\n"

EXPECTED = {
    "smollm2": {
        "one": SMOLLM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»",
        "two": SMOLLM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»",
    },
    "llama3": {
        "one": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»",
        "two": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«No.<|eot_id|>»",
        "system": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«No.<|eot_id|>»",
    },
    "mistral": {
        "one": "<s> [INST] Hi [/INST]« Yes.</s>»",
        "two": "<s> [INST] Hi [/INST]« Yes.</s>» [INST] So? [/INST]« No.</s>»",
        "system": "<s> [INST] Be brief.\n\nHi [/INST]« Yes.</s>» [INST] So? [/INST]« No.</s>»",
    },
    "gemma": {
        "one": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»",
        "two": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n«No.<end_of_turn>»",
        "system": None,
    },
    "zephyr": {
        "one": "<|user|>\nHi</s>\n<|assistant|>\n«Yes.</s>»",
        "two": "<|user|>\nHi</s>\n<|assistant|>\n«Yes.</s>»\n<|user|>\nSo?</s>\n<|assistant|>\n«No.</s>»",
        "system": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Yes.</s>»\n"
        "<|user|>\nSo?</s>\n<|assistant|>\n«No.</s>»",
    },
    "phi3": {  # closes a conversation with <|endoftext|>, which is no part of a turn
        "one": "<|user|>\nHi<|end|>\n<|assistant|>\n«Yes.<|end|>»",
        "two": "<|user|>\nHi<|end|>\n<|assistant|>\n«Yes.<|end|>»\n<|user|>\nSo?<|end|>\n<|assistant|>\n«No.<|end|>»",
        "system": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Yes.<|end|>»\n"
        "<|user|>\nSo?<|end|>\n<|assistant|>\n«No.<|end|>»",
    },
    "qwen3": {  # writes an empty thought into the last answer alone
        "one": f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«{THOUGHT}Yes.<|im_end|>»",
        "two": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«{THOUGHT}No.<|im_end|>»",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«{THOUGHT}No.<|im_end|>»",
    },
}


def model(name: str) -> Any:
    return tokenizer(template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), **MODELS[name])


def task_for(made: Any, *, max_tokens: int = 2048, overlong: str = "error", **section: Any) -> Generation:
    return Generation.from_tokenizer(
        made,
        TaskSection(kind="generation", **section),
        stops=stop_ids(made),
        end_of_text=end_of_text_id(made),
        max_tokens=max_tokens,
        overlong=overlong,
    )


def marked(made: Any, example: Example) -> str:
    """The tokens as text, runs of targets in «»."""
    assert example.supervised is not None
    text, inside = "", False
    for number, target in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
        text += ("«" if target else "»") * (target != inside) + made.decode([number])
        inside = target
    return text + "»" * inside


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(("shape", "messages"), [("one", ONE), ("two", TWO), ("system", SYSTEM)])
def test_targets_token_by_token(name: str, shape: str, messages: list[dict[str, str]]) -> None:
    made, wanted = model(name), EXPECTED[name][shape]
    task = task_for(made, preset="chat")
    if wanted is None:
        with pytest.raises(DataError, match=r"refuses a conversation: System role not supported; .*'Hi'"):
            task.encode([(json.dumps(messages),)])
        return
    (example,) = task.encode([(json.dumps(messages),)])
    assert marked(made, example) == wanted
    assert example.ids[-1] in stop_ids(made)
    (alike,) = pickle.loads(pickle.dumps(task)).encode([(json.dumps(messages),)])
    assert alike.ids.tolist() == example.ids.tolist()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_context_of_the_last_answer_is_what_a_server_sends(name: str) -> None:
    made = model(name)
    (example,) = task_for(made, preset="chat").encode([(json.dumps(TWO),)])
    sent = made.apply_chat_template(TWO[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert example.ids[: len(sent)].tolist() == sent
    whole = made.apply_chat_template(TWO, tokenize=False)
    assert whole.startswith(made.decode(example.ids.tolist()))


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_and_response_become_a_question_and_its_answer(name: str) -> None:
    made = model(name)
    task = task_for(made, prompt="{ask}", response="{say}.")
    assert [column.name for column in task.columns] == ["ask", "say"]
    assert marked(made, task.encode([("Hi", "Yes")])[0]) == EXPECTED[name]["one"]


def test_bytes_scored_are_those_of_the_answers() -> None:
    (example,) = task_for(model("smollm2"), preset="chat").encode([(json.dumps(TWO),)])
    assert example.scored_bytes == len("Yes.") + len("No.")


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "zephyr", "phi3", "qwen3"])
def test_a_template_that_adds_nothing_is_not_blamed(name: str) -> None:
    facts = task_for(model(name), preset="chat").facts
    assert facts["adds"] == []
    assert facts.get("adds_to_answers") == ("<think>\n\n</think>" if name == "qwen3" else None)


def test_a_template_that_injects_a_system_prompt_is_reported() -> None:
    facts = task_for(model("smollm2"), preset="chat").facts
    assert facts["adds"] == ["You are a helpful AI assistant named SmolLM, trained by Hugging Face"]
    vicuna = tokenizer(
        ["</s>"],
        eos_token="</s>",
        template="{{ 'A chat with a curious user. ' }}{% for m in messages %}"
        "{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
        "{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    )
    assert task_for(vicuna, preset="chat").facts["adds"] == ["A chat with a curious user. USER:"]


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    task = task_for(model("llama32"), preset="chat")
    assert task.facts["adds"] == ["Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025"]
    assert "2025-01-01" in task.facts["date"]
    (example,) = task.encode([(json.dumps(SYSTEM),)])
    text = marked(model("llama32"), example)
    assert "Today Date: 01 Jan 2025\n\nBe brief.<|eot_id|>" in text
    assert datetime.date.today().strftime("%d %b %Y") not in text


def test_a_template_that_rewrites_earlier_answers_is_reported() -> None:
    assert "only the last answer" in task_for(model("qwen3"), preset="chat").facts["targets"]
    assert "targets" not in task_for(model("phi3"), preset="chat").facts


@pytest.mark.parametrize(("name", "shown"), [("qwen3", [0, 1, 1]), ("phi3", [0, 0, 0])])
def test_answers_that_are_not_learnt_are_counted(name: str, shown: list[int]) -> None:
    task = task_for(model(name), preset="chat")
    examples = task.encode([(json.dumps(messages),) for messages in (ONE, TWO, SYSTEM)])
    assert [example.unlearnt for example in examples] == shown
    assert [one.unlearnt for one in task_for(model(name), prompt="{a}", response="{b}").encode([("Hi", "Yes")])] == [0]


def test_roles_that_a_template_leaves_out_are_reported() -> None:
    assert task_for(model("zephyr"), preset="chat").facts["leaves_out"] == ["tool"]
    assert "leaves_out" not in task_for(model("smollm2"), preset="chat").facts


def test_tool_messages_are_context_and_empty_answers_are_not_learnt() -> None:
    made = model("smollm2")
    messages = [
        ONE[0],
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Thanks"},
    ]
    (example,) = task_for(made, preset="chat").encode([(json.dumps(messages),)])
    assert marked(made, example) == (
        SMOLLM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n«It is 42.<|im_end|>»"
    )


def test_a_conversation_without_an_answer_has_no_target() -> None:
    (example,) = task_for(model("smollm2"), preset="chat").encode([(json.dumps(ONE[:1]),)])
    assert (example.fate, example.spans, example.scored_bytes) == ("no_target", (), 0)
    assert example.supervised is not None
    assert not example.supervised.any()


def test_an_answer_that_nothing_ends_is_refused() -> None:
    made = tokenizer(
        ["</s>"], eos_token="</s>", template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="without a token that stops generation: 'assistant: Yes") as caught:
        task_for(made, preset="chat").encode([(json.dumps(ONE),)])
    assert "eos_token" in str(caught.value.fix)


def test_text_that_changes_with_its_answer_is_refused() -> None:
    made = tokenizer(
        ["</s>"],
        eos_token="</s>",
        template="{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    )
    template = ChatTemplate.of(made, stop_ids(made))
    assert template is not None
    with pytest.raises(DataError, match=r"changes what stands before an answer \(message 2\).*'1Hi</s>' becomes '2Hi"):
        template.pieces(ONE)


def test_conversations_need_a_template() -> None:
    bare = tokenizer(["</s>"], eos_token="</s>")
    with pytest.raises(DataError, match="no chat template") as caught:
        task_for(bare, messages="chat")
    assert "task.prompt and task.response" in str(caught.value.fix)
