"""A copy of an export held against its certificate: a folder, a GGUF file, or a server."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distft.certificate import http
from distft.certificate.compare import compare, proved, refuse
from distft.certificate.identity import identity
from distft.certificate.record import Certificate
from distft.certificate.replay import replay
from distft.errors import JobError

#: The formats of a GGUF file's tensors that are not quantised. Norms are always F32.
_PLAIN = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def check_folder(certificate: Certificate, folder: Path) -> str:
    """Holds a Hugging Face folder against the certificate, by hashes and by what it answers in this process.

    Returns:
        A line that says what was proved.

    Raises:
        DataError: The folder is not safe to load, or cannot be loaded.
        RunError: It is not the model that was trained; the message names the reason.
    """
    from distft.model.files import check_folder as refuse_unsafe

    refuse_unsafe(folder)
    served, replies = identity(folder), replay(certificate, folder)
    refuse(compare(certificate, replies, served), str(folder))
    return proved(certificate, replies, served)


def check_gguf(certificate: Certificate, path: Path) -> str:
    """Holds a GGUF file against the certificate by what it answers, its tensors made plain again.

    Stops are those that its own tokenizer names; what quantisation changes is allowed for.

    Returns:
        A line that says what was proved.

    Raises:
        DataError: The file cannot be read.
        RunError: It is not the model that was trained; the message names the reason.
    """
    from distft.model.gguf_file import convert

    with tempfile.TemporaryDirectory() as temporary:
        convert(path, Path(temporary) / "model")
        replies = replay(certificate, Path(temporary) / "model")
    dtype = gguf_dtype(path)
    refuse(compare(certificate, replies, dtype=dtype), str(path))
    return proved(certificate, replies, None)


def gguf_dtype(path: Path) -> str:
    """The coarsest format of the file's tensors: a name of :data:`distft.certificate.compare.TOLERANCES`."""
    import gguf

    found = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors}
    if found - _PLAIN.keys():
        return "quantised"
    return next(_PLAIN[name] for name in ("BF16", "F16", "F32") if name in found)


def check_server(certificate: Certificate, url: str, key: str | None) -> str:
    """Holds a server's first model against the certificate by what it answers.

    Returns:
        A line that says what was proved.

    Raises:
        RunError: It cannot be asked, or does not serve the model that was trained; the message names the reason.
    """
    replies = http.replay(certificate, url, key=key)
    refuse(compare(certificate, replies), url)
    return proved(certificate, replies, None)


def check(certificate: Certificate, place: str, key: str | None = None) -> str:
    """Holds what is at ``place`` against the certificate.

    Args:
        certificate: What the trained model answered.
        place: A folder, a ``.gguf`` file or a server's ``http://`` address.
        key: The server's API key.

    Raises:
        JobError: There is nothing like that.
        DistftError: As :func:`check_folder`, :func:`check_gguf` and :func:`check_server` raise.
    """
    if place.startswith(("http://", "https://")):
        return check_server(certificate, place, key)
    path = Path(place)
    if path.is_dir():
        return check_folder(certificate, path)
    if path.suffix == ".gguf" and path.is_file():
        return check_gguf(certificate, path)
    raise JobError("there is no folder and no .gguf file", where=place, fix="name what serves the model")
