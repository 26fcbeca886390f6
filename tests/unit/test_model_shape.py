"""Sizes read from files' headers are those of the model that transformers builds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.sections import AdapterSection, ModelSection
from distft.errors import DataError
from distft.model.adapter import add_adapter
from distft.model.flops import flops_per_token
from distft.model.gguf_header import read_header
from distft.model.loss import LossModel
from distft.model.shape import Shape, of_config, of_folder, read_shape
from distft.plan import speed
from tests.unit.tiny_models import CONFIGS


@pytest.fixture(params=sorted(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def built(kind: str, folder: Path) -> tuple[torch.nn.Module, Shape]:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(folder)
    return model, of_folder(folder)


def test_sizes_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model, shape = built(kind, tmp_path)
    text = model.config.get_text_config()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.heads) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
    )
    assert shape.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert shape.stored_bytes == 4 * shape.parameters


def test_flops_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model, shape = built(kind, tmp_path)
    assert speed.flops_per_token(shape, shape.parameters, 48) == pytest.approx(flops_per_token(model, 48))


def test_whether_the_loss_can_take_the_heads_product(kind: str, tmp_path: Path) -> None:
    model, shape = built(kind, tmp_path)
    model.get_output_embeddings().weight.data.mul_(500)  # logits so large that capping them shows
    assert shape.plain_head == LossModel(model).fused


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapters_parameters_are_counted(kind: str, targets: str | list[str], dora: bool, tmp_path: Path) -> None:
    model, shape = built(kind, tmp_path)
    section = AdapterSection(kind="lora", rank=4, targets=targets, dora=dora)
    add_adapter(model, section, 1)
    assert shape.trained(section) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_classifier_has_a_head_of_labels(tmp_path: Path) -> None:
    _, shape = built("llama", tmp_path)
    classifier = shape.as_classifier(3)
    assert classifier.outputs == 3
    assert classifier.parameters == shape.parameters + (3 - shape.vocabulary) * shape.hidden
    section = AdapterSection(kind="lora")
    assert classifier.trained(section) - shape.trained(section) == 3 * shape.hidden


def test_a_gguf_files_header_tells_the_same(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "b" * 300, "c"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    shapes = {"token_embd.weight": (97, 32), "blk.0.attn_output.weight": (32, 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said, read = read_header(path)
    assert read == shapes
    assert said["llama.attention.head_count_kv"] == 2
    shape = read_shape(ModelSection(source=path.name), tmp_path)
    assert (shape.layers, shape.kv_heads, shape.vocabulary, shape.tied) == (2, 2, 97, True)
    assert shape.matrices == {"blk.0.attn_output.weight": (32, 32)}
    assert shape.stored_bytes == 4 * sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"PK" + bytes(100)])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_shape(ModelSection(source=path.name), tmp_path)


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(DataError, match="num_hidden_layers"):
        of_config({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}, {}, 0, "here")


def test_reading_sizes_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, distft.model.shape, distft.plan.choices, distft.plan.estimate; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "ray", "deepspeed"} & set(eval(done.stdout))


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that one public model needs; notes how many bytes of weights are asked for."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        name = self.path.rpartition("/resolve/main/")[2]
        if self.path.startswith("/api/models/owner/gpt"):
            siblings = [{"rfilename": file} for file in self.files]
            self.answer(json.dumps({"id": "owner/gpt", "sha": "0" * 40, "siblings": siblings}).encode())
        elif name in self.files:
            wanted = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            content = self.files[name]
            part = content[int(wanted[0]) : int(wanted[1]) + 1] if len(wanted) == 2 else content
            self.answer(part, {"ETag": f'"{name}"', "X-Repo-Commit": "0" * 40}, 206 if len(wanted) == 2 else 200)
        else:
            self.answer(b"{}", {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(content))
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_of_a_model_on_the_hub_headers_are_enough(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "model")
    padding = bytes(5_000_000)  # weights that nobody may ask for
    Hub.files = {
        "config.json": (tmp_path / "model" / "config.json").read_bytes(),
        "model.safetensors": (tmp_path / "model" / "model.safetensors").read_bytes() + padding,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pathlib import Path\nfrom distft.config.sections import ModelSection\n"
        "from distft.model.shape import read_shape\n"
        "print(read_shape(ModelSection(source='owner/gpt'), Path()).parameters)"
    )
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True, timeout=60
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in model.parameters())
    assert sum(Hub.sent) < 1_000_000
