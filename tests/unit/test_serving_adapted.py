"""Several adapters over one base: each answers as its merged model does, whoever else is in the batch."""

# ruff: noqa: F811 - fixtures of another module are arguments here

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distft.certificate import read
from distft.certificate.identity import weights_of
from distft.certificate.shared import base_of
from distft.config import Job
from distft.config.sections import AdapterSection
from distft.errors import DataError, JobError, RunError
from distft.export import export_base
from distft.model import answers
from distft.model.adapter import add_adapter, merge_adapter, write_adapter
from distft.model.mixed_adapters import Adapter, read_adapter
from distft.orchestrate.bases import saving, shared_bases
from distft.orchestrate.listener import Silent
from distft.orchestrate.serving.server import _changed
from distft.runs import Run
from distft.serving.adapted import SharedService
from distft.serving.app import Replica
from distft.serving.protocol import ApiError, Question, Sampling, Token
from distft.serving.replica import proven_together
from distft.serving.settings import Settings, deployments
from distft.serving.transformers_engine import TransformersEngine
from distft.task.prepare import prepare
from distft.train.folder import begin

from .test_certificate import LORA, Made, Make, home, make  # noqa: F401 - fixtures
from .tiny_models import CONFIGS, tokenizer

pytestmark = pytest.mark.usefixtures("module_cache")

TOKENIZER = tokenizer(["<|endoftext|>", "<s>", "</s>"], eos_token="</s>", bos_token="<s>")
PROMPTS = [[5 + number, *range(number + 3, 3 * number + 6)] for number in range(4)]
LONG = [7 + number % 80 for number in range(70)]  # more than two pages of keys and values
SECTIONS: dict[str, dict[str, Any]] = {
    "wide": {"rank": 4, "alpha": 24.0},
    "narrow": {"rank": 1, "alpha": 8.0, "rslora": True},
}


def base_model(kind: str, seed: int = 1) -> PreTrainedModel:
    config = CONFIGS[kind]()
    config.initializer_range, config.bos_token_id, config.eos_token_id = 0.4, 1, 2
    setattr(config, "n_positions" if kind == "gpt2" else "max_position_embeddings", 128)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model: PreTrainedModel, seed: int, folder: Path, **section: Any) -> PreTrainedModel:
    """The model with an adapter that does much, which the folder holds too."""
    add_adapter(model, AdapterSection(kind="lora", **section), seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    write_adapter(model, folder, "base")
    return model


class Mixed:
    """An engine over one base, two adapters of it, and the merged model of each."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.engine = TransformersEngine(base_model(kind), TOKENIZER, concurrent=4, adapted=True)
        self.adapters: dict[str, Adapter | None] = {"base": None}
        self.merged = {"base": base_model(kind)}
        targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
        for seed, (name, section) in enumerate(SECTIONS.items()):
            section = section | ({"targets": targets} if name == "narrow" else {})
            model = adapted(base_model(kind), seed, folder / name, **section)
            merge_adapter(model)
            self.merged[name] = model
            self.adapters[name] = read_adapter(folder / name, self.engine.model)

    async def written(self, name: str, prompt: list[int], sampling: Sampling) -> list[Token]:
        pieces = self.engine.write(prompt, sampling, self.adapters[name])
        return [token async for tokens in pieces for token in tokens]

    def together(self, *asked: tuple[str, list[int], Sampling]) -> list[list[Token]]:
        async def all_of_it() -> list[list[Token]]:
            return await asyncio.gather(*(self.written(*one) for one in asked))

        return asyncio.run(all_of_it())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    made = Mixed(request.param, tmp_path_factory.mktemp("adapters"))
    yield made
    asyncio.run(made.engine.close())


def test_in_one_batch_each_adapter_writes_what_its_merged_model_does(mixed: Mixed) -> None:
    asked = [(name, prompt, Sampling(20)) for prompt in [*PROMPTS, LONG] for name in mixed.merged]
    found = mixed.together(*asked)
    for (name, prompt, _), tokens in zip(asked, found, strict=True):
        (expected,) = answers(mixed.merged[name], TOKENIZER, [prompt], 20)
        assert [token.id for token in tokens[: len(expected.ids)]] == list(expected.ids), name
    assert len({tuple(token.id for token in tokens) for tokens in found[:3]}) == 3  # or nothing was adapted


@pytest.mark.parametrize("prompt", [PROMPTS[2], LONG], ids=["short", "long"])
def test_log_probabilities_are_those_of_the_merged_model(mixed: Mixed, prompt: list[int]) -> None:
    asked = Sampling(8, temperature=1.0, seed=3, top_logprobs=0)
    company = mixed.together(*((name, prompt, asked) for name in mixed.merged))
    for name, tokens in zip(mixed.merged, company, strict=True):
        whole = [*prompt, *(token.id for token in tokens)]
        with torch.no_grad():
            logits = mixed.merged[name](input_ids=torch.tensor([whole])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(1)
        told = [token.logprob for token in tokens]
        assert told == pytest.approx(
            [float(row[token.id]) for row, token in zip(expected, tokens, strict=True)], abs=1e-4
        )
        (alone,) = mixed.together((name, prompt, asked))
        assert [token.id for token in alone] == [token.id for token in tokens]
        assert [token.logprob for token in alone] == pytest.approx(told, abs=1e-4)


def test_the_base_is_in_memory_once(mixed: Mixed) -> None:
    def stored(*tensors: torch.Tensor) -> int:
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    held = list(mixed.engine.model.parameters())
    adapters = [half for one in mixed.adapters.values() if one for pair in one.products.values() for half in pair]
    alone = stored(*mixed.merged["base"].parameters())
    assert stored(*held) == alone
    assert stored(*held, *adapters) == alone + sum(half.nbytes for half in adapters)
    assert stored(*(weight for model in mixed.merged.values() for weight in model.parameters())) == 3 * alone


@pytest.mark.parametrize(
    ("section", "why"),
    [({"dora": True}, "lora_magnitude_vector"), ({"rank": 4}, "shapes that do not fit")],
    ids=["DoRA", "another model's"],
)
def test_what_is_no_plain_adapter_of_the_model_is_refused(section: dict[str, Any], why: str, tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.intermediate_size *= 2 if "dora" not in section else 1
    adapted(AutoModelForCausalLM.from_config(config), 1, tmp_path / "adapter", **section)
    with pytest.raises(DataError, match=why):
        read_adapter(tmp_path / "adapter", base_model("llama"))


def test_an_adapter_with_a_head_beside_it_is_refused(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"]())
    adapted(model, 1, tmp_path / "adapter", rank=2)
    with pytest.raises(DataError, match=r"score\.weight of the adapter belongs to no matrix"):
        read_adapter(tmp_path / "adapter", base_model("llama"))
    with pytest.raises(DataError, match="cannot be read"):
        read_adapter(tmp_path, base_model("llama"))


# Exports of runs, each proved through HTTP.


@pytest.fixture(scope="module")
def exports(make: Make, home: Path) -> tuple[dict[str, Path], Made]:
    """Two adapters over one base, which is exported too, and how one of them was made."""
    chat, text = make("chat", LORA), make("text", LORA)
    prepared = prepare(chat.job, chat.base)
    base = export_base(chat.job, chat.base, home / "base-export", dtype="fp32", prepared=prepared)
    return {"chat": chat.folder, "text": text.folder, "base": base}, chat


@pytest.fixture
def folders(exports: tuple[dict[str, Path], Made], tmp_path: Path) -> dict[str, Path]:
    """Copies, to be spoilt."""
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in exports[0].items()}


@contextmanager
def shared(folders: dict[str, Path], base: Path) -> Iterator[tuple[SharedService, dict[str, str]]]:
    word = base_of(folders["chat"])
    assert word is not None
    service, proofs = proven_together(folders, base, word, max_new_tokens=64, concurrent=4, waiting=16)
    try:
        yield service, proofs
    finally:
        asyncio.run(service.close())


def ask(service: SharedService, folders: dict[str, Path], name: str) -> bool:
    """Whether a model answers as its certificate says."""
    record = read(folders[name]).records[0]
    chat = {"messages": record.ask.messages} if record.ask.messages else {"prompts": (record.ask.ids,)}
    question = Question(name, **chat, sampling=Sampling(len(record.tokens)), ids=True)

    async def tokens() -> tuple[int, ...]:
        return tuple([token.id async for delta in service.answer(question) for token in delta.tokens])

    return asyncio.run(tokens()) == record.tokens


def test_every_model_over_one_base_is_proved(exports: tuple[dict[str, Path], Made]) -> None:
    folders, made = exports
    assert len({base_of(folder) for folder in folders.values()}) == 1
    with shared(folders, made.base) as (service, proofs):
        assert {model.name for model in service.models()} == set(folders)
        for name, proof in proofs.items():
            assert f"{len(read(folders[name]).records)} prompts with equal ids" in proof
            assert ask(service, folders, name)
    assert "2 adapters over one base, which is served too: " in saving(folders.values())


def test_the_adapter_of_another_run_is_refused_by_name(
    exports: tuple[dict[str, Path], Made], folders: dict[str, Path]
) -> None:
    other = folders["text"] / "adapter" / "adapter_model.safetensors"
    shutil.copy(other, folders["chat"] / "adapter")
    with (
        pytest.raises(
            RunError, match=r"^chat \(.*; adapter: adapter/adapter_model.safetensors is another than was exp"
        ),
        shared(folders, exports[1].base),
    ):
        pass


def test_an_adapter_whose_numbers_are_others_is_refused_by_what_it_answers(
    exports: tuple[dict[str, Path], Made], folders: dict[str, Path]
) -> None:
    path = folders["text"] / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    trust(folders["text"], path)
    with (
        pytest.raises(RunError, match=r"^text \(.*not the model that was trained; weights: "),
        shared(folders, exports[1].base),
    ):
        pass


def trust(folder: Path, path: Path) -> None:
    """Puts a file's new hash where the export vouches for it."""
    from hashlib import sha256

    file = folder / "distft.json"
    values = json.loads(file.read_text())
    values["sha256"][path.relative_to(folder).as_posix()] = sha256(path.read_bytes()).hexdigest()
    file.write_text(json.dumps(values))


def test_another_base_is_refused(exports: tuple[dict[str, Path], Made], tmp_path: Path) -> None:
    folders, made = exports
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(RunError, match="other weights than those that the adapters were trained"),
        shared(folders, base),
    ):
        pass


def test_an_adapter_that_nobody_asks_for_goes_and_is_proved_again_when_somebody_does(
    exports: tuple[dict[str, Path], Made], folders: dict[str, Path]
) -> None:
    async def dropped_while_asked(service: SharedService) -> list[str]:
        answer = service.answer(Question("text", ("1",), sampling=Sampling(8)))
        await anext(answer)
        gone = service.drop_idle(0)
        await answer.aclose()
        return gone

    with shared(folders, exports[1].base) as (service, _):
        assert service.drop_idle(3600) == []
        assert asyncio.run(dropped_while_asked(service)) == ["chat"]
        assert service.drop_idle(0) == ["text"]
        assert [model.name for model in service.models()] == ["base"]
        assert ask(service, folders, "chat")
        assert service.drop_idle(3600) == []
        assert [model.name for model in service.models()] == ["base", "chat"]

        shutil.copy(folders["chat"] / "adapter" / "adapter_model.safetensors", folders["text"] / "adapter")
        with pytest.raises(ApiError, match="text could not be loaded again") as refused:
            ask(service, folders, "text")
        assert refused.value.status == 503
        assert ask(service, folders, "base")
        with pytest.raises(ApiError, match="there is no model") as unknown:
            asyncio.run(anext(service.answer(Question("nobody", (LONG,)))))
        assert unknown.value.status == 404


def test_a_replica_lets_idle_adapters_go_where_it_may_go_itself(exports: tuple[dict[str, Path], Made]) -> None:
    folders, made = exports
    models, word = {name: str(folder) for name, folder in folders.items()}, str(base_of(folders["chat"]))
    settings = Settings(models=models, bases={word: str(made.base)}, min_replicas=0, idle_seconds=1e-6)
    replica = Replica(models, word, settings)
    asyncio.run(replica.check_health())
    assert {model.name for model in replica._service.models()} == {"base"}
    assert "prompts with equal ids" in asyncio.run(replica.proof("text"))
    record = read(folders["text"]).records[0]
    asked = Question("text", (record.ask.ids,), sampling=Sampling(len(record.tokens)), ids=True)
    pieces = asyncio.run(replica.whole(asked))
    assert tuple(token.id for delta in pieces for token in delta.tokens) == record.tokens
    asyncio.run(replica._service.close())


# Which models share.


def test_models_over_one_base_share_a_deployment(exports: tuple[dict[str, Path], Made], make: Make) -> None:
    folders, made = exports
    word = base_of(folders["chat"])
    assert word == f"{weights_of(made.base)}-fp32"
    models = {name: str(folder) for name, folder in {**folders, "whole": make("text").folder}.items()}
    assert deployments(models, {}) == {name: (name,) for name in models}
    together = {f"base+{word}": ("chat", "text", "base"), "whole": ("whole",)}
    assert deployments(models, {word: "somewhere"}) == together
    settings = Settings(models=models, bases={word: "somewhere"})
    assert settings.deployments() == together
    assert [settings.base(place) for place in together] == [word, ""]
    vllm = settings.model_copy(update={"engine": "vllm"})
    assert vllm.deployments() == {name: (name,) for name in models}


class Notes(Silent):
    def __init__(self) -> None:
        self.said = ""

    def note(self, text: str) -> None:
        self.said += text


def test_the_base_is_found_where_two_models_share_it_and_it_is_the_one_of_training(
    exports: tuple[dict[str, Path], Made], tmp_path: Path
) -> None:
    folders, made = exports
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    run, notes = Run(tmp_path / "runs" / "chat"), Notes()
    begin(Job.from_values(made.job.dump() | {"model": {"source": str(base), "adapter": LORA}}, made.job.folder), run)
    runs, word = {"chat": run, "text": run}, str(base_of(folders["chat"]))
    assert shared_bases(runs, folders, "auto", notes) == {word: str(base)}
    assert "2 adapters over one base, which is served too: " in notes.said
    assert shared_bases({"chat": run}, {"chat": folders["chat"]}, "auto", notes) == {}

    assert shared_bases(runs, folders, "vllm", notes) == {}
    assert "with vllm each has weights of its own" in notes.said

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert shared_bases(runs, folders, "auto", notes) == {}
    assert f"{base} has others now" in notes.said
    shutil.rmtree(base)
    assert shared_bases(runs, folders, "auto", notes) == {}
    assert "cannot share their base's weights: " in notes.said.rpartition("others now")[2]


def test_an_export_whose_adapter_is_gone_has_weights_of_its_own(folders: dict[str, Path]) -> None:
    (folders["chat"] / "adapter" / "adapter_model.safetensors").unlink()
    assert base_of(folders["chat"]) is None
    assert base_of(folders["text"]) is not None


@pytest.mark.parametrize(
    ("task", "adapter"),
    [("chat", None), ("classes", LORA), ("plain", {**LORA, "dora": True})],
    ids=["full", "head", "dora"],
)
def test_what_needs_more_than_the_base_has_weights_of_its_own(
    task: str,
    adapter: dict[str, Any] | None,
    make: Make,
) -> None:
    assert base_of(make(task, adapter).folder) is None


def test_a_name_does_not_move_between_its_own_weights_and_a_base(
    exports: tuple[dict[str, Path], Made], make: Make
) -> None:
    folders, _ = exports
    word = base_of(folders["chat"])
    assert word is not None
    models = {"a": str(folders["chat"]), "b": str(folders["text"])}
    homes = dict.fromkeys(models, f"base+{word}")
    before = Settings(models=models, bases={word: "somewhere"})
    assert _changed(before, homes, ["a", "b"]) == {f"base+{word}"}
    joined = before.model_copy(update={"models": {**models, "c": str(folders["base"])}})
    assert _changed(joined, homes, ["c"]) == {f"base+{word}"}
    whole = before.model_copy(update={"models": {**models, "a": str(make("text").folder)}})
    with pytest.raises(JobError, match="a shares a base with others") as refused:
        _changed(whole, homes, ["a"])
    assert "NEWNAME=RUN --update" in str(refused.value)
    assert _changed(whole, {"b": f"base+{word}"}, ["a"]) == {"a"}
