"""The loss against a teacher, compared with the formula written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from model_preparation import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.train.heal.objective import Distillation, check_teacher
from model_preparation.train.heal.settings import HealSettings
from tests.conftest import tiny_config

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(checkpoint_dir, donor_dir):
    student, tokenizer = load_checkpoint(checkpoint_dir)
    return student, load_other(OtherModel("donor", donor_dir, is_checkpoint=False), tokenizer)[0]


def test_the_loss_is_kl_cross_entropy_and_hidden_states_as_weighted(pair):
    student, teacher = pair
    settings = HealSettings(teacher="donor", temperature=2.0, teacher_weight=0.7, hidden_weight=0.3)
    with torch.no_grad():
        ours, theirs = student(IDS, output_hidden_states=True), teacher(IDS, output_hidden_states=True)
        found = Distillation(teacher, settings).loss(ours, IDS)
    p = (theirs.logits[:, :-1] / 2).softmax(-1)
    q = (ours.logits[:, :-1] / 2).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    text = cross_entropy(ours.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    hidden = sum((a - b).square().sum() / b.square().sum() for a, b in pairs) / 4
    torch.testing.assert_close(found, 0.7 * 4 * kl + 0.3 * text + 0.3 * hidden)


def test_a_teacher_is_its_own_best_student(pair):
    _, teacher = pair
    with torch.no_grad():
        loss = Distillation(teacher, HealSettings()).loss(teacher(IDS), IDS)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_another_vocabulary_or_depth_is_refused(pair):
    student, teacher = pair
    other = type(student)(tiny_config(n_layer=3))
    check_teacher(teacher, other, HealSettings())
    with pytest.raises(SurgeryError, match="number of layers is 4, the checkpoint's 3"):
        check_teacher(teacher, other, HealSettings(teacher="donor", hidden_weight=1.0))
    with pytest.raises(SurgeryError, match="vocabulary is 260, the checkpoint's 99"):
        check_teacher(teacher, type(student)(tiny_config(vocab_size=99)), HealSettings())
