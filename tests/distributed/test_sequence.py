"""Rows that ranks share (DeepSpeed-Ulysses): what comes of them, and which models cannot be trained so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.world import World
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

#: Tokens of a row: neither two nor four divide it.
TOKENS = 23


def classifier_scores(folder: str) -> list[list[Any]]:
    """Losses and hits of packed texts, and the norm of their gradient, with 1, 2 and 4 ranks that share rows."""
    import torch

    from distft import engine as engines
    from distft.model import Batch, LossModel, load_classifier

    world, found = World.from_environment(), []
    ids = torch.randint(2, 200, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, TOKENS).contiguous()
    labels = torch.full((2, TOKENS), -100)
    labels[:, [3, 8, 15, 22]] = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])
    for sharing in (1, 2, 4):
        torch.manual_seed(5)
        model = LossModel(
            load_classifier(Path(folder), torch.float32, labels=["a", "b", "c"], pad_id=1),
            activation_checkpointing=True,
        )
        settings = engines.Settings(stage=2, sequence_parallel_size=sharing)
        engine = engines.open(model, settings, world)
        mine = Batch(ids, positions, labels) if world.rank < sharing else Batch.empty(1)
        rows = engine.forward_backward(mine, 1.0, last=True, seed=0)
        sums = engine.sum_over_ranks(rows.tolist() or [0.0, 0.0])
        norm = engine.step(0.0)
        losses, hits = engine.scores(Batch(ids, positions, labels))
        found.append([sums, norm, losses.tolist(), hits.tolist()])
        engine.close()
    return found


def test_texts_of_a_shared_row_are_scored_as_those_of_a_whole_one(home: Path) -> None:
    for alone, two, four in run_ranks(classifier_scores, 4, str(home / "model")):
        assert sum(map(sum, alone[3])) > 0  # it is right about some
        for shared in (two, four):
            assert shared[:2] == [pytest.approx(alone[0], rel=1e-5), pytest.approx(alone[1], rel=1e-5)]
            assert shared[2] == [pytest.approx(row, rel=1e-5) for row in alone[2]]
            assert shared[3] == alone[3]


def refusals() -> list[str]:
    """What is said to models whose layers have a window, or draw dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    from distft import engine as engines
    from distft.errors import JobError
    from distft.model import LossModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    window = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=1, vocab_size=20, sliding_window=6))
    dropping = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=20, attn_pdrop=0.0))
    found = []
    for model in (window, dropping):
        settings = engines.Settings(sequence_parallel_size=2)
        with pytest.raises(JobError) as refused:
            engines.open(LossModel(model.to(torch.float32)), settings, World.from_environment())
        found.append(str(refused.value))
    return found


def test_models_that_need_more_than_positions_are_refused() -> None:
    for window, dropping in run_ranks(refusals, 2):
        assert "needs more than positions (a window, say)" in window
        assert "train.sequence_parallel_size" in window
        assert "dropout would draw other numbers" in dropping
