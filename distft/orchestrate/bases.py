"""Which of the models to be served are adapters over one base, and where that base is: its weights are held once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from distft.certificate.identity import weights_of
from distft.certificate.shared import ADAPTER, base_of, has_adapter
from distft.errors import DataError
from distft.model import materialise
from distft.orchestrate.listener import Listener
from distft.runs import Run
from distft.train.folder import job_of


def shared_bases(
    runs: Mapping[str, Run], folders: Mapping[str, Path], engine: str, listener: Listener
) -> dict[str, str]:
    """The folders of bases that two models or more share, by their word (:func:`~distft.certificate.shared.base_of`).

    A base that is gone, or is another now than the adapters were trained over, is left out: each model is then served
    with the weights of its own that its export has.

    Args:
        runs: By model; a model without a run is the base of another one's.
        folders: The exports of all models.
        engine: What writes tokens; vllm is given merged weights alone.
        listener: Who is told, how much memory it saves too.
    """
    members = defaultdict[str, list[str]](list)
    for name, folder in folders.items():
        if (word := base_of(folder)) is not None:
            members[word].append(name)
    found = {}
    for word, names in members.items():
        if len(names) < 2:
            continue
        if engine == "vllm":
            listener.note(
                f"  {', '.join(names)}: with vllm each has weights of its own; transformers shares their base"
            )
            continue
        job = job_of(next(runs[name] for name in names if name in runs))
        try:
            base = materialise(job.model, job.folder)
            same = weights_of(base) == word.partition("-")[0]
        except DataError as error:
            listener.note(f"  {', '.join(names)} cannot share their base's weights: {error}")
            continue
        if not same:
            listener.note(f"  {', '.join(names)} cannot share their base's weights: {base} has others now")
            continue
        found[word] = str(base)
        listener.note(f"  {saving([folders[name] for name in names])}")
    return found


def saving(folders: Iterable[Path]) -> str:
    """A line that says what it saves to hold the weights beneath some exports once."""
    whole = [_bytes(folder) for folder in folders]
    adapters = [_bytes(folder / ADAPTER) for folder in folders if has_adapter(folder)]
    others = "" if len(adapters) == len(whole) else ", which is served too"
    return (
        f"{len(adapters)} adapter{'s' * (len(adapters) > 1)} over one base{others}: "
        f"{(max(whole) + sum(adapters)) / 1e9:.3g} GB instead of {sum(whole) / 1e9:.3g} GB"
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
