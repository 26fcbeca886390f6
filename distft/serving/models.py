"""What an export's folder says of the model in it, without loading it."""

from __future__ import annotations

from pathlib import Path

from distft.errors import RunError
from distft.runs import read_json
from distft.serving.protocol import Model


def model_of(name: str, folder: Path) -> Model:
    """The model in an export's folder.

    Raises:
        RunError: There is none.
    """
    certificate, config = folder / "distft.json", folder / "config.json"
    if not (certificate.is_file() and config.is_file()):
        raise RunError("no model is exported here", where=str(folder), fix="distft export RUN")
    settings = read_json(config)
    tokenizer = read_json(folder / "tokenizer_config.json")
    return Model(
        name=name,
        kind=read_json(certificate)["task"],
        created=int(certificate.stat().st_mtime),
        context=settings.get("max_position_embeddings") or settings["n_positions"],
        chat="chat_template" in tokenizer or (folder / "chat_template.jinja").is_file(),
    )
