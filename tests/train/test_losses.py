"""The loss against a teacher, compared with the formula written out."""

import pytest
import torch

from model_preparation import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.train.heal.losses import (
    Distillation,
    LiveTeacher,
    TeacherOutput,
    check_teacher,
    divergence,
    losses_of,
    next_tokens,
)
from model_preparation.train.heal.settings import HealSettings
from tests.conftest import tiny_config

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(checkpoint_dir, donor_dir):
    student, tokenizer = load_checkpoint(checkpoint_dir)
    return student, load_other(OtherModel("donor", donor_dir, is_checkpoint=False), tokenizer)[0]


LABELS = IDS.clone()
LABELS[0, 3:6] = LABELS[1, :] = -100
LABELS[1, 4] = 7


@pytest.mark.parametrize("labels", [IDS, LABELS], ids=["all", "some"])
@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_the_formula_in_float64(pair, reverse, labels):
    student, teacher = pair
    settings = HealSettings(
        teacher="donor", temperature=2.0, teacher_weight=0.7, reverse_weight=reverse, hidden_weight=0.3
    )
    with torch.no_grad():
        ours, theirs = student(IDS, output_hidden_states=True), teacher(IDS, output_hidden_states=True)
    leaves = [ours.logits.requires_grad_(), ours.hidden_states[2].requires_grad_()]
    found = Distillation(LiveTeacher(teacher, settings), settings).loss(
        ours, {"input_ids": IDS, "targets": next_tokens(labels)}
    )
    found.backward()

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    p, q = ((logits[:, :-1] / 2).softmax(-1) for logits in (theirs.logits.double(), wide[0]))
    counts = labels[:, 1:] != -100
    forward, backward = (p * (p / q).log()).sum(-1)[counts], (q * (q / p).log()).sum(-1)[counts]
    kl = (1 - reverse) * forward.mean() + reverse * backward.mean()
    likely = wide[0][:, :-1].softmax(-1)[counts].gather(1, labels[:, 1:][counts].unsqueeze(1))
    hidden = [hidden.double() for hidden in ours.hidden_states]
    hidden[2] = wide[1]
    pairs = zip(hidden[1:], theirs.hidden_states[1:], strict=True)
    pairs = [(a[:, :-1][counts], b[:, :-1][counts].double()) for a, b in pairs]
    distance = sum((a - b).square().sum() / b.square().sum() for a, b in pairs) / 4
    wanted = 0.7 * 4 * kl - 0.3 * likely.log().mean() + 0.3 * distance
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for leaf, exact in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_a_teacher_is_its_own_best_student(pair):
    _, teacher = pair
    batch = {"input_ids": IDS, "targets": next_tokens(IDS)}
    for reverse in (0.0, 1.0):
        with torch.no_grad():
            settings = HealSettings(teacher="donor", reverse_weight=reverse)
            loss = Distillation(LiveTeacher(teacher, settings), settings).loss(teacher(IDS), batch)
        assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reverse", [0.0, 0.4])
def test_all_but_the_teachers_likeliest_tokens_count_as_one_token(reverse):
    ours, theirs = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    known, tokens = theirs.log_softmax(-1).detach().topk(4)
    others = (1 - known.exp().sum(1)).log()
    found = divergence(ours.log_softmax(-1), TeacherOutput(known, tokens, others), reverse)
    p, q = (
        torch.stack([*(d.gather(1, tokens).unbind(1)), 1 - d.gather(1, tokens).sum(1)], 1)
        for d in (theirs.detach().softmax(-1), ours.softmax(-1))
    )
    torch.testing.assert_close(found, ((1 - reverse) * p * (p / q).log() + reverse * q * (q / p).log()).sum())
    if not reverse:  # the gradient of the whole distribution, at the known tokens
        (gradient,) = torch.autograd.grad(found, ours)
        whole = ours.softmax(-1) - theirs.softmax(-1)
        torch.testing.assert_close(gradient.gather(1, tokens), whole.gather(1, tokens))


def test_only_tokens_with_a_label_have_a_loss():
    logits = torch.randn(2, 9, 260, generator=torch.Generator().manual_seed(1))
    wanted = -logits.double()[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses_of(logits, next_tokens(IDS))[:, :-1].double(), wanted)
    wanted[LABELS[:, 1:] == -100] = 0
    wanted[1, 3] = -logits.double()[1, 3].log_softmax(-1)[7]
    torch.testing.assert_close(losses_of(logits, next_tokens(LABELS))[:, :-1].double(), wanted)


def test_a_teacher_of_another_vocabulary_or_depth_is_refused(pair):
    student, teacher = pair
    other = type(student)(tiny_config(n_layer=3))
    check_teacher(teacher, other, HealSettings())
    with pytest.raises(SurgeryError, match="number of layers is 4, the checkpoint's 3"):
        check_teacher(teacher, other, HealSettings(teacher="donor", hidden_weight=1.0))
    with pytest.raises(SurgeryError, match="vocabulary is 260, the checkpoint's 99"):
        check_teacher(teacher, type(student)(tiny_config(vocab_size=99)), HealSettings())
