"""Rows to tensors. The rule of labels: position t predicts token t + 1 of its own segment, or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.model import IGNORED, Batch


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    supervised: np.ndarray
    segments: tuple[int, ...]


def row(ids: list[int], supervised: list[int], segments: tuple[int, ...] | None = None) -> Row:
    return Row(np.array(ids, np.int32), np.array(supervised, bool), segments or (len(ids),))


def test_collate_shifts_labels_restarts_positions_and_pads() -> None:
    rows = [row([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], (3, 2)), row([4, 3, 2], [0, 0, 1])]
    batch = Batch.collate(rows, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[6, 7, -100, 9, -100], [-100, 2, -100, -100, -100]]
    assert batch.supervised_tokens == 4
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.labels)} == {torch.int64}


def test_invariant_5_masks_first_tokens_and_padding_carry_no_loss() -> None:
    """Even where the data marks the first token of a segment, nobody may predict it from another segment."""
    batch = Batch.collate([row([5, 6, 7, 8], [1, 1, 1, 1], (2, 2)), row([9], [1])], pad_id=6)
    assert batch.labels.tolist() == [[6, -100, 8, -100], [-100] * 4]


def test_a_target_with_the_padding_id_is_still_a_target() -> None:
    assert Batch.collate([row([5, 1, 5], [0, 1, 1])], pad_id=1).labels.tolist() == [[1, 5, -100]]


def test_collate_leaves_the_row_alone() -> None:
    given_row = row([5, 6], [1, 1])
    Batch.collate([given_row], pad_id=0)
    assert given_row.supervised.tolist() == [True, True]


@given(
    st.lists(
        st.lists(
            st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_supervised_token_is_a_label_once(rows_of_segments: list[list[list[tuple[int, bool]]]]) -> None:
    rows = [
        row(
            [token for segment in segments for token, _ in segment],
            [supervised and place > 0 for segment in segments for place, (_, supervised) in enumerate(segment)],
            tuple(len(segment) for segment in segments),
        )
        for segments in rows_of_segments
    ]
    batch = Batch.collate(rows, pad_id=0)
    for index, each in enumerate(rows):
        labels = batch.labels[index]
        assert labels[labels != IGNORED].tolist() == each.input_ids[each.supervised].tolist()
        assert (batch.position_ids[index, : len(each.input_ids)] == 0).sum() == len(each.segments)


def test_empty_has_no_labels() -> None:
    batch = Batch.empty(3)
    assert batch.input_ids.tolist() == [[3, 3]]
    assert batch.supervised_tokens == 0
    assert batch.to("cpu").position_ids.tolist() == [[0, 1]]


def test_a_few_columns_around_the_first_target() -> None:
    labels = torch.full((2, 40), IGNORED)
    labels[0, 30], labels[1, 35] = 7, 8
    ids = torch.arange(80).view(2, 40)
    few = Batch(ids, torch.arange(40).expand(2, 40), labels).around_first_target(8)
    assert few.input_ids.tolist() == [list(range(26, 34)), list(range(66, 74))]
    assert few.position_ids[0].tolist() == list(range(26, 34))
    assert few.supervised_tokens == 1
    without = Batch(ids, ids, torch.full((2, 40), IGNORED)).around_first_target(8)
    assert without.input_ids[0].tolist() == list(range(8))


@given(tokens=st.integers(2, 20), parts=st.integers(1, 5))
def test_columns_are_the_batch_cut_into_equal_parts(tokens: int, parts: int) -> None:
    ids = torch.arange(2 * tokens).view(2, tokens)
    batch = Batch(ids, ids % tokens, ids + 1)
    cut = [batch.columns(index, parts) for index in range(parts)]
    assert len({part.input_ids.shape for part in cut}) == 1
    for name in ("input_ids", "position_ids", "labels"):
        together = torch.cat([getattr(part, name) for part in cut], dim=1)
        assert torch.equal(together[:, :tokens], getattr(batch, name))
    padding = torch.cat([part.labels for part in cut], dim=1)[:, tokens:]
    assert padding.shape[1] < parts
    assert (padding == IGNORED).all()
