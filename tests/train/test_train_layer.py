"""One layer's training: what is compared, what is trained, where it starts; each computed here anew."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from model_preparation import SurgeryError
from model_preparation.checkpoint.llamba_init import llamba_config, mamba_layer
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.train.distill.student_layer import student_config, student_layer, student_tensors
from model_preparation.train.distill.train_layer import (
    Batch,
    in_order,
    rate_factor,
    relative_error,
    shuffled,
    train_layer,
)

LENGTH = 24


@pytest.fixture(scope="module")
def donor(donor_dir) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(donor_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def states(donor) -> torch.Tensor:
    """What enters layer 1: (12, LENGTH, 32)."""
    tokens = torch.randint(0, 256, (12, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return donor(tokens, output_hidden_states=True).hidden_states[1]


def start(donor, mixer=None, seed=0) -> LlambaDecoderLayer:
    config = student_config(donor.config, mixer)
    tensors = student_tensors(dict(donor.model.layers[1].state_dict()), donor.config, config, seed)
    return student_layer(tensors, config, "cpu")


def attention_of(donor, states) -> torch.Tensor:
    """What the attention block of layer 1 adds (caught by a hook), and the output of the whole layer."""
    layer, caught = donor.model.layers[1], []
    hook = layer.self_attn.register_forward_hook(lambda module, args, out: caught.append(out[0]))
    positions = donor.model.rotary_emb(states, torch.arange(states.shape[1])[None])
    with torch.no_grad():
        out = layer(states, position_embeddings=positions)
    hook.remove()
    return caught[0], out


def test_the_relative_error_is_error_over_variance(donor, states):
    student = start(donor)
    wanted, output = attention_of(donor, states)
    with torch.no_grad():
        given, given_output = student.mixer(student.input_layernorm(states)), student(states)
    layer = donor.model.layers[1]

    def ratio(given, wanted):
        return ((given - wanted) ** 2).mean() / (wanted - wanted.mean((0, 1))).pow(2).mean()

    batches = list(in_order(states[:5])) + list(in_order(states[5:]))
    assert relative_error(layer, student, batches) == pytest.approx(ratio(given, wanted).item(), rel=1e-4)
    assert relative_error(layer, student, batches, "layer") == pytest.approx(
        ratio(given_output - states, output - states).item(), rel=1e-4
    )

    counts = torch.zeros(states.shape[:2])
    counts[:, 3:9] = 2.0  # only these positions count
    some = relative_error(layer, student, in_order(states, counts))
    assert some == pytest.approx(ratio(given[:, 3:9], wanted[:, 3:9]).item(), rel=1e-4)


@pytest.mark.parametrize("target", ["mixer", "layer"])
def test_training_comes_closer_and_touches_nothing_but_the_mixer(donor, states, target):
    student, layer = start(donor), donor.model.layers[1]
    before = copy.deepcopy(student.state_dict())
    initial = relative_error(layer, student, in_order(states), target)
    steps = []
    losses = train_layer(
        layer, student, shuffled(states, None, 4, seed=1), steps=40, learning_rate=3e-3, target=target, log=steps.append
    )
    assert relative_error(layer, student, in_order(states), target) < 0.7 * initial
    assert losses == [step.loss for step in steps]
    assert [step.step for step in steps] == list(range(40))
    assert max(step.learning_rate for step in steps) == pytest.approx(3e-3)
    for name, tensor in student.state_dict().items():
        assert tensor.equal(before[name]) == (not name.startswith("mixer.")), name


def test_it_starts_as_the_untrained_base_does(donor, states):
    config = llamba_config(donor.config)
    plain = LlambaDecoderLayer(config, 0).eval()
    plain.load_state_dict(mamba_layer(dict(donor.model.layers[1].state_dict()), donor.config))
    with torch.no_grad():
        torch.testing.assert_close(start(donor)(states), plain(states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mixer", [{"d_state": 24}, {"d_state": 5}, {"n_v_heads": 4}, {"n_v_heads": 4, "n_qk_heads": 1, "d_conv": 2}]
)
def test_another_size_starts_from_what_fits(donor, states, mixer):
    student = start(donor, mixer)
    assert student.mixer.n_v_heads == mixer.get("n_v_heads", 2)
    same = start(donor)
    with torch.no_grad():
        given, wanted = student(states), same(states)
    if mixer in ({"d_state": 24}, {"n_v_heads": 4}):  # larger ones do the same at first
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    taught = train_layer(
        donor.model.layers[1], student, shuffled(states, None, 4, seed=1), steps=30, learning_rate=3e-3
    )
    assert taught[-1] < 0.8 * taught[0]


def test_the_same_seed_gives_the_same_start_and_order(donor, states):
    first, second, other = (start(donor, {"d_state": 24}, seed).mixer.in_proj.weight for seed in (3, 3, 4))
    assert first.equal(second)
    assert not first.equal(other)
    orders = [next(shuffled(states, None, 12, seed)).hidden_states for seed in (3, 3, 4)]
    assert orders[0].equal(orders[1])
    assert not orders[0].equal(orders[2])
    two_rounds = [
        batch.hidden_states[:, 0, 0] for batch, _ in zip(shuffled(states, None, 4, 0), range(6), strict=False)
    ]
    for round_ in (two_rounds[:3], two_rounds[3:]):  # every sequence once
        assert torch.cat(round_).sort().values.equal(states[:, 0, 0].sort().values)


def test_the_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_what_cannot_be_trained(donor, states):
    layer = donor.model.layers[1]
    with pytest.raises(SurgeryError, match="lower --learning_rate"):
        train_layer(layer, start(donor), [Batch(states * float("nan"))], steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="1 batches for 2 steps"):
        train_layer(layer, start(donor), [Batch(states)], steps=2, learning_rate=1e-3)
    with pytest.raises(SurgeryError, match="no size width"):
        student_config(donor.config, {"width": 3})
    with pytest.raises(SurgeryError, match="n_qk_heads 3 does not divide"):
        student_config(donor.config, {"n_qk_heads": 3})
