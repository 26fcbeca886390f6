"""The classifier: its head, its predictions against transformers' own, class weights, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from distft.config import Job
from distft.errors import DataError, JobError
from distft.model import Batch, LossModel, class_weights, load_classifier

from .tiny_models import CONFIGS, VOCABULARY

LABELS = ("calm", "storm", "fog")
PAD = 5  # not the configuration's


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    supervised: np.ndarray
    segments: tuple[int, ...]


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(PAD + 1, VOCABULARY, length).tolist()


def row(*examples: tuple[list[int], int]) -> Row:
    """A row of texts, each with its label's number behind it as the one supervised token."""
    segments = [[*ids, label] for ids, label in examples]
    supervised = [number == len(ids) - 1 for ids in segments for number in range(len(ids))]
    return Row(np.concatenate(segments), np.array(supervised), tuple(len(ids) for ids in segments))


EXAMPLES = [(text(9, 1), 2), (text(1, 2), 0), (text(14, 3), 1), (text(6, 4), 1)]
PACKED = Batch.collate([row(*EXAMPLES[:3]), row(EXAMPLES[3])], PAD)
PADDED = Batch.collate([row(one) for one in EXAMPLES], PAD)


def base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def classifier(folder: Path, seed: int = 0, labels: tuple[str, ...] = LABELS) -> transformers.PreTrainedModel:
    return load_classifier(folder, torch.float32, labels=labels, seed=seed, pad_id=PAD)


@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_are_transformers_own_packed_padded_and_alone(name: str, tmp_path: Path) -> None:
    """Its own forward finds the last token by the pad token, and never sees the number that we put behind the text."""
    model = classifier(base(name, tmp_path))
    model.score.weight.data *= 20  # so that a wrong last token would show
    width = max(len(ids) for ids, _ in EXAMPLES)
    ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in EXAMPLES])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.log_softmax(1)
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits.log_softmax(1) for ids, _ in EXAMPLES])
    ours = LossModel(model).eval()
    for batch in (PACKED, PADDED):
        torch.testing.assert_close(ours.class_log_probabilities(batch), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, theirs, rtol=0, atol=1e-5)
    assert theirs.exp().std(0).min() > 1e-2  # they differ from text to text


def test_loss_and_hits_are_those_of_the_predictions(tmp_path: Path) -> None:
    model = LossModel(classifier(base("llama", tmp_path)))
    predicted = model.eval().class_log_probabilities(PACKED)
    targets = torch.tensor([label for _, label in EXAMPLES])
    losses, hits = model.scores(PACKED)
    expected = F.nll_loss(predicted, targets, reduction="none")
    torch.testing.assert_close(losses[PACKED.labels != -100], expected)
    assert hits[PACKED.labels != -100].tolist() == (predicted.argmax(1) == targets).tolist()
    assert losses.count_nonzero() == 4
    assert torch.equal(losses, model.token_losses(PACKED))
    packed, padded = (gradients(model, batch) for batch in (PACKED, PADDED))
    assert packed["loss"].item() == pytest.approx(float(expected.sum()), rel=1e-6)
    for key, gradient in packed.items():
        torch.testing.assert_close(padded[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def gradients(model: LossModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = model.train()(batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_invariant_5_masks_a_batch_without_labels_adds_nothing(tmp_path: Path) -> None:
    found = gradients(LossModel(classifier(base("llama", tmp_path))), Batch.empty(PAD))
    assert all(not gradient.any() for gradient in found.values())


def test_class_weights_multiply_losses(tmp_path: Path) -> None:
    folder = base("llama", tmp_path)
    plain = LossModel(classifier(folder)).token_losses(PACKED)
    weighted = LossModel(classifier(folder), class_weights=[1.0, 0.5, 4.0])
    factors = torch.tensor([4.0, 1.0, 0.5, 0.5])  # of the labels 2, 0, 1, 1
    carries = PACKED.labels != -100
    torch.testing.assert_close(weighted.token_losses(PACKED)[carries], plain[carries] * factors)
    total, rows = weighted(PACKED)
    assert total.item() == pytest.approx(float(weighted.token_losses(PACKED).sum()), rel=1e-6)
    torch.testing.assert_close(rows, weighted.token_losses(PACKED).double().sum(1), rtol=1e-6, atol=0)
    assert "_class_weights" not in weighted.state_dict()


def job(**task: object) -> Job:
    return Job.from_values(
        {
            "name": "a",
            "model": {"source": "m"},
            "task": {"kind": "classification", **task},
            "data": {"source": "a.csv"},
        },
        Path(),
    )


CARD = {"labels": {"names": [*LABELS], "rows": {"train": {"calm": 6, "storm": 2, "fog": 4}}}}


def test_balanced_weights_have_mean_one_over_the_training_rows() -> None:
    weights = class_weights(job(class_weights="balanced"), LABELS, CARD)
    assert weights == pytest.approx([12 / (3 * 6), 12 / (3 * 2), 12 / (3 * 4)])
    assert (6 * weights[0] + 2 * weights[1] + 4 * weights[2]) / 12 == pytest.approx(1)
    assert class_weights(job(), LABELS, CARD) is None
    without = {"labels": {"rows": {"train": {"calm": 3, "storm": 1}}}}
    assert class_weights(job(class_weights="balanced"), LABELS, without) == pytest.approx([4 / 6, 2, 1])


def test_given_weights() -> None:
    assert class_weights(job(class_weights={"fog": 3.5}), LABELS, CARD) == [1, 1, 3.5]
    with pytest.raises(JobError, match="hail: no such label") as caught:
        class_weights(job(class_weights={"fog": 3.5, "hail": 1}), LABELS, CARD)
    assert "calm, storm, fog" in str(caught.value)


def test_a_fresh_head_is_drawn_from_the_seed_and_an_own_one_kept(tmp_path: Path) -> None:
    folder = base("llama", tmp_path / "base")
    torch.manual_seed(1)
    first = classifier(folder)
    torch.manual_seed(2)  # what was drawn before does not count
    again, other = classifier(folder), classifier(folder, seed=1)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert first.config.id2label == {0: "calm", 1: "storm", 2: "fog"}
    assert first.config.pad_token_id == PAD
    other.save_pretrained(tmp_path / "classifier")
    for labels in (LABELS, ()):
        assert torch.equal(classifier(tmp_path / "classifier", labels=labels).score.weight, other.score.weight)
    for labels in (("a", "b", "c"), ("a", "b", "c", "d")):  # as many, and more: a head of other labels is of no use
        fresh = classifier(tmp_path / "classifier", labels=labels).score.weight.detach()
        assert fresh.shape[0] == len(labels)
        assert not torch.equal(fresh[:3], other.score.weight)
        assert math.isfinite(float(fresh.sum()))


def test_what_is_no_gpt_or_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = base("llama", tmp_path / "base")
    with pytest.raises(DataError, match=r"1 weights are missing, score.weight"):
        classifier(folder, labels=())
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError, match="no head named score"):
        classifier(tmp_path / "bert")
    deeper = transformers.AutoConfig.from_pretrained(folder)
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(folder)
    with pytest.raises(DataError, match=r"weights are missing, model\.layers\.2"):
        classifier(folder)
