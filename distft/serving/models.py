"""What an export's folder says of the model in it, without loading it."""

from __future__ import annotations

from pathlib import Path

from distft.certificate import read
from distft.certificate.record import FILE
from distft.errors import JobError
from distft.runs import read_json
from distft.serving.protocol import Model


def model_of(name: str, folder: Path) -> Model:
    """The model in an export's folder.

    Raises:
        JobError: There is none that can be proved.
    """
    certificate, config = read(folder), read_json(folder / "config.json")
    text = config.get("text_config", config)
    return Model(
        name=name,
        kind=certificate.kind,
        created=int((folder / FILE).stat().st_mtime),
        context=text.get("max_position_embeddings") or text.get("n_positions"),
        chat=certificate.identity.template is not None,
    )


def refuse_other_engine(model: Model, engine: str) -> None:
    """Makes sure that an engine does what a model is for.

    Raises:
        JobError: It does not.
    """
    if engine == "vllm" and model.kind == "classification":
        raise JobError(
            "vllm writes text, and tells no labels", where=model.name, fix="serve it with the engine transformers"
        )
