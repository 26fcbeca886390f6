"""The parity certificate: what training answered, and planted faults, each refused with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distft import engine as engines
from distft.certificate import Certificate, Reply, compare, http, read
from distft.certificate.check import check
from distft.certificate.identity import identity
from distft.certificate.replay import replay
from distft.checkpoint import Folder, Saver, State
from distft.cli import main
from distft.config import Job
from distft.data.store import Prepared
from distft.errors import DataError, JobError, RunError
from distft.export import export, export_base, write_card
from distft.model import DTYPES, Batch, LossModel, load_tokenizer, training_model
from distft.model.gguf_file import convert
from distft.task.prepare import prepare
from distft.world import World

from .test_model_files import write_gguf
from .tiny_models import CONFIGS, SMOLLM2, tokenizer

pytestmark = pytest.mark.usefixtures("module_cache")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Norway", "Oslo"), ("Egypt", "Cairo")]
TASKS: dict[str, dict[str, Any]] = {
    "chat": {"kind": "generation", "preset": "chat"},
    "plain": {"kind": "generation", "prompt": "Capital of {country}?\n", "response": "{capital}"},
    "text": {"kind": "language_modeling"},
    "classes": {"kind": "classification"},
}
LORA = {"kind": "lora", "rank": 4}
PAD = 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models with and without a template, and rows for every task."""
    return written_home(tmp_path_factory.mktemp("certified"))


def written_home(made: Path, **shape: int) -> Path:
    torch.manual_seed(0)
    config = CONFIGS["llama-tied"]()
    config.update({"max_position_embeddings": 256, **shape})
    for name, template in (("chat", CHATML), ("plain", None)):
        tokens = tokenizer(**{**SMOLLM2, "template": template})
        config.vocab_size = len(tokens)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(made / name)
        tokens.save_pretrained(made / name)
    with (made / "rows.jsonl").open("w") as file:
        for number in range(20):
            country, capital = CAPITALS[number % 5]
            messages = [{"role": "user", "content": f"{number}: {country}"}, {"role": "assistant", "content": capital}]
            row = {"country": f"{number} {country}", "capital": capital, "messages": messages}
            file.write(json.dumps(row | {"text": f"{number}: {capital} in {country}", "label": capital[0]}) + "\n")
    return made


@dataclasses.dataclass(frozen=True)
class Made:
    folder: Path
    base: Path
    job: Job
    checkpoint: Any


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(home: Path) -> Make:
    """Trains a little and exports; each combination once."""
    known: dict[str, Made] = {}

    def made(
        task: str,
        adapter: dict[str, Any] | None = None,
        dtype: str = "fp32",
        steps: int = 20,
        base: Path | None = None,
    ) -> Made:
        key = f"{task}-{'lora' if adapter else 'full'}-{dtype}{'-other' if base else ''}"
        if key in known:
            return known[key]
        base = base or home / ("chat" if task in ("chat", "text") else "plain")
        values = {"name": "tiny", "model": {"source": str(base), "adapter": adapter}, "task": TASKS[task]}
        splits = {"validation": 0.3, "test": 0.1}
        job = Job.from_values({**values, "data": {"source": "rows.jsonl", "max_tokens": 64, "splits": splits}}, home)
        prepared = prepare(job, base)
        rows = Prepared.open(prepared)
        labels = list(rows.labels)
        model = LossModel(training_model(job, base, DTYPES[dtype], labels, PAD))
        engine = engines.open(model, engines.Settings(dtype=DTYPES[dtype]), World(), "plain")
        batch = Batch.collate(list(rows.rows("train")), PAD)
        for _ in range(steps):
            engine.forward_backward(batch, 1 / batch.supervised_tokens, last=True, seed=0)
            engine.step(0.02)
        saver = Saver(engine, Folder(home / key / "checkpoints"), bytes(32), 10**9)
        checkpoint = saver.save(State(steps, 1, 0, dtype, "x", labels=labels))
        to = export(job, base, checkpoint, home / key / "export", dtype=dtype, prepared=prepared)
        known[key] = Made(to, base, job, checkpoint)
        return known[key]

    return made


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Made], Path]:
    return lambda made: Path(shutil.copytree(made.folder, tmp_path / "copy"))


def reasons(certificate: Certificate, folder: Path) -> list[str]:
    return [one.reason for one in compare(certificate, replay(certificate, folder), identity(folder))]


def by_behaviour(certificate: Certificate, folder: Path) -> list[str]:
    return [one.reason for one in compare(certificate, replay(certificate, folder))]


def edit(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


SOUND = [("chat", None), ("chat", LORA), ("plain", LORA), ("text", None), ("classes", None), ("classes", LORA)]


@pytest.mark.parametrize(("task", "adapter"), SOUND, ids=lambda value: value if isinstance(value, str) else None)
def test_the_export_is_the_model_that_was_trained(task: str, adapter: dict[str, Any] | None, make: Make) -> None:
    made = make(task, adapter)
    certificate = read(made.folder)
    assert len(certificate.records) >= 8
    assert len({record.ask.ids for record in certificate.records}) == len(certificate.records)
    assert reasons(certificate, made.folder) == []
    said = check(certificate, str(made.folder))
    assert f"{len(certificate.records)} prompts with equal ids" in said
    assert "by hash" in said


def test_bf16_is_proved_within_what_its_rounding_does(make: Make) -> None:
    made = make("plain", LORA, "bf16", 2)
    certificate = read(made.folder)
    assert certificate.dtype == "bf16"
    assert certificate.identity.dtypes == {"bf16"}
    assert reasons(certificate, made.folder) == []


@pytest.mark.parametrize(("task", "adapter"), [("chat", LORA), ("text", None)], ids=["chat", "text"])
def test_the_base_has_a_certificate_of_its_own(
    task: str, adapter: dict[str, Any] | None, make: Make, tmp_path: Path
) -> None:
    made = make(task, adapter)
    prepared = prepare(made.job, made.base)
    folder = export_base(made.job, made.base, tmp_path / "base", dtype="fp32", prepared=prepared)
    base, tuned = read(folder), read(made.folder)
    assert reasons(base, folder) == []
    assert {record.ask.ids for record in base.records} <= {record.ask.ids for record in tuned.records}
    assert "weights" in reasons(base, made.folder)
    weights, before = load_file(folder / "model.safetensors"), load_file(made.base / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert not (folder / "adapter").exists()


def test_what_a_certificate_asks(make: Make) -> None:
    certificate = read(make("chat").folder)
    asks = [record.ask for record in certificate.records]
    shapes = {tuple(message["role"] for message in ask.messages) for ask in asks if ask.messages}
    assert {("user",), ("system", "user"), ("user", "assistant", "user")} <= shapes
    words = {country for country, _ in CAPITALS}
    assert all(any(word in str(ask.messages) for word in words) for ask in asks if ask.messages)
    assert any(ask.prompt and "東京" in ask.prompt for ask in asks)
    endings = [record for record in certificate.records if record.ask.prompt is None and record.ask.messages is None]
    assert endings
    assert all(record.stopped and record.tokens == (2,) for record in endings)
    assert all(len(r.tokens) == len(r.logprobs) == len(r.gaps) for r in certificate.records)
    assert all(gap >= 0 for record in certificate.records for gap in record.gaps)
    texts = read(make("text").folder).records
    assert all(record.ask.prompt is not None for record in texts if len(record.tokens) > 1)
    assert {"Paris", "Rome", "Lima"} & {word for record in texts for word in (record.ask.prompt or "").split()}


def test_the_certificate_survives_a_new_model_card(make: Make, copy: Callable[[Made], Path]) -> None:
    made = make("plain", LORA)
    folder = copy(made)
    write_card(made.job, made.checkpoint, folder, dtype="fp32", scores={"best": {"test": {}}})
    assert read(folder) == read(made.folder)


def swap_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML.replace("assistant", "model"))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def drop_stop(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=0)


def stop_early(folder: Path) -> None:
    letter = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["a"]
    edit(folder / "generation_config.json", eos_token_id=[0, 2, letter])


def double_bos(folder: Path) -> None:
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    edit(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        },
    )


def swap_letters(folder: Path) -> None:
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    model["vocab"] |= {"e": model["vocab"]["a"], "a": model["vocab"]["e"]}
    edit(path, model=model)


def scale(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name] * -4})


def halve(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    edit(folder / "config.json", dtype="bfloat16")


def compute_in_fp16(folder: Path) -> None:
    edit(folder / "config.json", dtype="float16")


def punish_repetition(folder: Path) -> None:
    edit(folder / "generation_config.json", repetition_penalty=5.0)


FAULTS = [
    (swap_template, "template", True),
    (drop_template, "template", True),
    (drop_stop, "stop token", True),
    (stop_early, "stop token", True),
    (double_bos, "BOS", True),
    (swap_letters, "tokenizer", True),
    (scale, "weights", True),
    (halve, "dtype", True),
    (compute_in_fp16, "dtype", True),
    (punish_repetition, "generation settings", False),  # from tokens alone it looks like other weights
]


@pytest.mark.parametrize(("fault", "reason", "seen"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_refused_with_its_reason(
    fault: Callable[[Path], None], reason: str, seen: bool, make: Make, copy: Callable[[Made], Path]
) -> None:
    made = make("chat")
    certificate, folder = read(made.folder), copy(made)
    fault(folder)
    assert reasons(certificate, folder) == [reason]
    assert by_behaviour(certificate, folder) == ([reason] if seen else ["weights"])


@pytest.mark.parametrize("task", ["chat", "plain", "classes"])
def test_an_adapter_that_is_not_merged(task: str, make: Make, copy: Callable[[Made], Path]) -> None:
    made = make(task, LORA)
    certificate, folder = read(made.folder), copy(made)
    unmerged = load_file(made.base / "model.safetensors")
    rewrite(folder, lambda tensors: {name: unmerged.get(name, tensor) for name, tensor in tensors.items()})
    assert reasons(certificate, folder) == ["adapter"]
    assert by_behaviour(certificate, folder) == ["adapter"]


@pytest.mark.parametrize(
    ("fault", "reason"), [(swap_letters, "tokenizer"), (double_bos, "BOS"), (scale, "weights"), (halve, "dtype")]
)
def test_faults_of_a_classifier(
    fault: Callable[[Path], None], reason: str, make: Make, copy: Callable[[Made], Path]
) -> None:
    made = make("classes")
    certificate, folder = read(made.folder), copy(made)
    fault(folder)
    assert reasons(certificate, folder) == [reason]
    assert by_behaviour(certificate, folder) == [reason]


def test_a_tensor_that_changes_no_answer_is_found_by_its_hash(make: Make, copy: Callable[[Made], Path]) -> None:
    made = make("text")
    certificate, folder = read(made.folder), copy(made)
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name] * (1 + 1e-6)})
    assert by_behaviour(certificate, folder) == []
    (finding,) = compare(certificate, replay(certificate, folder), identity(folder))
    assert finding.reason == "weights"
    assert f"1 of {len(certificate.identity.tensors)} tensors are others, {name}" in finding.what


def test_what_changes_no_answer_is_harmless(make: Make, copy: Callable[[Made], Path]) -> None:
    made = make("chat")
    certificate, folder = read(made.folder), copy(made)
    edit(folder / "generation_config.json", max_length=9, temperature=0.1, top_p=0.5, do_sample=True)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert reasons(certificate, folder) == []


def tampered(certificate: Certificate, place: int, **changes: Any) -> Certificate:
    """The certificate with one answer otherwise."""
    records = list(certificate.records)
    records[place] = dataclasses.replace(records[place], **changes)
    return dataclasses.replace(certificate, records=tuple(records))


def test_after_a_near_tie_nothing_is_compared_and_before_it_everything(make: Make) -> None:
    made = make("text")
    certificate = read(made.folder)
    replies = replay(certificate, made.folder)
    record = certificate.records[0]
    other = (record.tokens[0], 77 if record.tokens[1] != 77 else 78, *record.tokens[2:])
    gaps = (record.gaps[0], 1e-4, *record.gaps[2:])
    tie = tampered(certificate, 0, tokens=other, gaps=gaps, logprobs=(*record.logprobs[:2], *[-9.0] * len(gaps[2:])))
    assert compare(tie, replies) == []
    sure = tampered(certificate, 0, tokens=other, gaps=(record.gaps[0], 9.0, *record.gaps[2:]))
    assert [finding.reason for finding in compare(sure, replies)] == ["weights"]
    assert f"training said {other[1]}" in compare(sure, replies)[0].what


def test_answers_that_are_cut_off_are_not_stops(make: Make) -> None:
    certificate = read(make("text").folder)
    replies = replay(certificate, make("text").folder)
    place = next(place for place, record in enumerate(certificate.records) if len(record.tokens) > 4)
    one = replies[place]
    replies[place] = dataclasses.replace(one, tokens=one.tokens[:3], logprobs=one.logprobs[:3], stopped=False)
    assert [finding.reason for finding in compare(certificate, replies)] == ["generation settings"]


def test_numbers_that_are_none_are_refused(make: Make) -> None:
    for task in ("text", "classes"):
        certificate = read(make(task).folder)
        nothing = {
            "logprobs": lambda reply: tuple(float("nan") for _ in reply.logprobs),
            "labels": lambda reply: dict.fromkeys(reply.labels, float("nan")),
        }
        replies = [
            dataclasses.replace(reply, **{name: make_of(reply) for name, make_of in nothing.items()})
            for reply in replay(certificate, make(task).folder)
        ]
        assert [finding.reason for finding in compare(certificate, replies)] == ["weights"]


def test_a_gguf_file_is_proved_by_what_it_answers(make: Make, home: Path) -> None:
    write_gguf(home / "tiny.gguf")
    convert(home / "tiny.gguf", home / "gguf")
    certificate = read(make("text", base=home / "gguf", steps=0).folder)
    assert "prompts with equal ids" in check(certificate, str(home / "tiny.gguf"))
    place = next(place for place, record in enumerate(certificate.records) if len(record.tokens) > 2)
    tokens, gaps = certificate.records[place].tokens, certificate.records[place].gaps
    tokens = (tokens[0], 99 if tokens[1] != 99 else 98, *tokens[2:])
    other = tampered(certificate, place, tokens=tokens, gaps=(gaps[0], 9.0, *gaps[2:]))
    with pytest.raises(RunError, match=r"tiny\.gguf: this is not the model that was trained; weights"):
        check(other, str(home / "tiny.gguf"))
    with pytest.raises(JobError, match=r"no \.gguf file"):
        check(certificate, str(home / "none.gguf"))


class Server(BaseHTTPRequestHandler):
    """OpenAI's API with vLLM's fields over a folder, by transformers."""

    certificate: Certificate
    replies: dict[str, Reply]
    posted: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.send({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer secret":
            self.send({"error": {"message": "no such key"}}, 401)
            return
        self.posted.append(body)
        reply = self.replies[json.dumps(body.get("messages") or body.get("prompt") or body["input"])]
        usage = {"prompt_tokens": len(reply.ids or ())}
        if reply.refused:
            self.send({"error": {"message": reply.refused}}, 400)
        elif reply.labels:
            chances = {label: float(torch.tensor(value).exp()) for label, value in reply.labels.items()}
            self.send({"data": [{"label": max(chances), "probabilities": chances}], "usage": usage})
        else:
            chat = self.path == "/v1/chat/completions"
            told = {"content": [{"logprob": value} for value in reply.logprobs]}
            choice = {
                "token_ids": reply.tokens,
                "logprobs": told if chat else {"token_logprobs": reply.logprobs},
                "finish_reason": "stop" if reply.stopped else "length",
            }
            ids = {"prompt_token_ids": reply.ids}
            self.send({"choices": [choice if chat else choice | ids], "usage": usage} | (ids if chat else {}))

    def send(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(certificate: Certificate, folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that says over HTTP what the folder answers."""
    replies = {}
    for record, reply in zip(certificate.records, replay(certificate, folder), strict=True):
        messages = None if record.ask.messages is None else list(record.ask.messages)
        replies[json.dumps(messages or record.ask.prompt or list(record.ask.ids))] = reply
    handler = type("Handler", (Server,), {"replies": replies, "posted": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.posted
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("task", ["chat", "classes"])
def test_the_same_over_http(
    task: str, make: Make, copy: Callable[[Made], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    made = make(task)
    certificate, folder = read(made.folder), copy(made)
    with serving(certificate, made.folder) as (url, posted):
        assert compare(certificate, http.replay(certificate, url, key="secret"), identity(made.folder)) == []
        assert "prompts with equal ids" in check(certificate, f"{url}/v1", "secret")
        assert all(body.get("temperature", 0) == 0 and body["model"] == "tiny" for body in posted)
        with pytest.raises(RunError, match="401: no such key"):
            http.replay(certificate, url, model="tiny")
    with pytest.raises(RunError, match="cannot be asked"):
        http.replay(certificate, url, model="tiny")
    fault, reason = (drop_template, "template") if task == "chat" else (scale, "weights")
    fault(folder)
    with serving(certificate, folder) as (url, _):
        found = [one.reason for one in compare(certificate, http.replay(certificate, url, key="secret"))]
    assert found == [reason]


def test_the_command(make: Make, copy: Callable[[Made], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(make("chat"))
    with pytest.raises(SystemExit) as left:
        main(["export", "--check", str(folder)])
    assert left.value.code == 0
    assert "prompts with equal ids" in capsys.readouterr().out
    swap_template(folder)
    with pytest.raises(SystemExit) as left:
        main(["export", "--check", str(folder)])
    assert left.value.code == 5
    assert "template: a conversation becomes" in capsys.readouterr().err


def test_a_folder_that_is_not_safe_is_not_loaded(make: Make, copy: Callable[[Made], Path]) -> None:
    certificate, folder = read(make("chat").folder), copy(make("chat"))
    edit(folder / "generation_config.json", _attn_implementation_internal="somebody/kernel")
    with pytest.raises(DataError, match="_internal"):
        check(certificate, str(folder))
    edit(folder / "generation_config.json", _attn_implementation_internal=None)
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(DataError, match="auto_map"):
        check(certificate, str(folder))
    edit(folder / "config.json", auto_map=None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickles"):
        check(certificate, str(folder))


def test_an_export_without_a_certificate_says_how_to_get_one(make: Make, copy: Callable[[Made], Path]) -> None:
    folder = copy(make("chat"))
    edit(folder / "distft.json", parity=None)
    with pytest.raises(JobError, match=r"no parity certificate.*\n.*distft export RUN"):
        read(folder)
    (folder / "distft.json").unlink()
    with pytest.raises(JobError, match="--check"):
        read(folder)


def test_the_date_in_a_template_is_that_of_training(home: Path, tmp_path: Path, make: Make) -> None:
    made = make("chat")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    dated = load_tokenizer(base)
    dated.chat_template = "{{ strftime_now('%Y') }}" + CHATML
    dated.save_pretrained(base)
    folder = export(made.job, base, made.checkpoint, tmp_path / "export", dtype="fp32")
    assert load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)[:4] == "2025"
