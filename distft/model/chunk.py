"""Of how many tokens logits exist at a time; without torch, since the planner counts them too."""

from __future__ import annotations

CHUNK_BYTES = 32 * 2**20
"""Bytes of one chunk's logits in fp32. Smaller costs speed (the weight's gradient is read and written once a
chunk), larger costs memory; see benchmarks."""
GPU_TOKENS = 1024
"""Tokens of a chunk on a GPU, at least. A product of n tokens in bf16 makes n operations for each byte of the head
that it reads (2 n D V over 2 D V), and while an H100 reads a byte it makes 295 (989 TFLOP/s over 3.35 TB/s, its data
sheet): 65 tokens, 32 MiB of 128,256 logits, would wait for memory (the roofline of Williams et al., 2009)."""


def chunk_tokens(outputs: int, device_type: str) -> int:
    """Tokens of a chunk, with that many logits each, on ``cpu`` or ``cuda``."""
    return max(GPU_TOKENS if device_type == "cuda" else 1, CHUNK_BYTES // (4 * outputs))
