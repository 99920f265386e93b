"""The mixer against an independent computation: upstream's recurrence, token by token, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_preparation.llamba import ssd
from model_preparation.llamba.mixer import LlambaMixer
from tests.conftest import seeded, tiny_config


def recurrence(mixer: LlambaMixer, ssm: dict, hidden: Tensor) -> Tensor:
    """Out of (batch, length, d_model), one token and one head after the other, from the definition."""
    weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    hidden = hidden.double()
    batch, length, d_model = hidden.shape
    d_inner = ssm["expand"] * d_model
    H, G, N, K = ssm["n_v_heads"], ssm["n_qk_heads"], ssm["d_state"], ssm["d_conv"]
    P = d_inner // H
    projected = F.linear(hidden, weights["in_proj.weight"], weights.get("in_proj.bias"))
    conv_width = d_inner + 2 * G * N
    xBC, z, a = projected[..., :conv_width], projected[..., conv_width : conv_width + d_inner], projected[..., -H:]
    out = torch.zeros(batch, length, d_inner, dtype=torch.float64)
    for b in range(batch):
        state = torch.zeros(H, P, N, dtype=torch.float64)
        for t in range(length):
            mixed = torch.zeros(conv_width, dtype=torch.float64)
            for tap in range(K):
                if t - (K - 1) + tap >= 0:
                    mixed += weights["conv1d.weight"][:, 0, tap] * xBC[b, t - (K - 1) + tap]
            mixed = mixed + weights["conv1d.bias"] if "conv1d.bias" in weights else mixed
            if ssm["activation"] != "identity":
                mixed = mixed * torch.sigmoid(mixed)
            x = mixed[:d_inner].view(H, P)
            B = mixed[d_inner : d_inner + G * N].view(G, N)
            C = mixed[d_inner + G * N :].view(G, N)
            for h in range(H):
                g = h // (H // G)
                decay = torch.exp(-torch.logaddexp(torch.zeros_like(a[b, t, h]), a[b, t, h]))
                state[h] = decay * state[h] + torch.outer(x[h], B[g])
                y = state[h] @ C[g] + weights["D"][h] * x[h]
                out[b, t, h * P : (h + 1) * P] = y
    gate = z if "z_bias" not in weights else z + weights["z_bias"]
    return F.linear(out * gate * torch.sigmoid(gate), weights["out_proj.weight"], weights.get("out_proj.bias"))


def make_mixer(seed: int = 0, d_model: int = 32, **ssm) -> tuple[LlambaMixer, dict]:
    config = tiny_config(d_model=d_model, ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4, **ssm})
    return seeded(LlambaMixer(config, 0), seed), config.ssm_cfg


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.std()).item()


@pytest.mark.parametrize(
    "ssm",
    [
        {},
        {"n_qk_heads": 2},
        {"n_qk_heads": 1},
        {"expand": 2},
        {"bias": True},
        {"conv_bias": False},
        {"activation": "silu"},
        {"activation": "swish", "n_qk_heads": 2, "bias": True, "expand": 2},
        {"d_conv": 1},
        {"d_conv": 2},
        {"d_state": 5},
    ],
    ids=lambda ssm: " ".join(f"{name}={value}" for name, value in ssm.items()) or "published",
)
def test_every_configuration_computes_the_recurrence(ssm):
    mixer, cfg = make_mixer(**ssm)
    hidden = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))
    assert relative_error(mixer(hidden), recurrence(mixer, cfg, hidden)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), chunk_size=st.integers(1, 48), seed=st.integers(0, 1000))
def test_chunks_need_not_divide_the_length(length, chunk_size, seed):
    mixer, cfg = make_mixer(seed, chunk_size=chunk_size)
    hidden = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))
    assert relative_error(mixer(hidden), recurrence(mixer, cfg, hidden)) < 1e-5


def test_longer_than_the_longest_chunk():
    mixer, cfg = make_mixer(chunk_size=128)
    hidden = torch.randn(1, 3 * ssd.MAX_CHUNK + 5, 32, generator=torch.Generator().manual_seed(3))
    assert relative_error(mixer(hidden), recurrence(mixer, cfg, hidden)) < 1e-5


def test_with_biases_there_is_no_z_bias():
    names = {name for name, _ in make_mixer(bias=True)[0].named_parameters()}
    assert {"in_proj.bias", "out_proj.bias"} <= names
    assert "z_bias" not in names
    assert "z_bias" in {name for name, _ in make_mixer(bias=False)[0].named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a", [-60000.0, -1000.0, -110.0, -12.0, 0.0, 50.0, 1000.0, 60000.0])
def test_extreme_decays_stay_finite_and_right(dtype, a):
    """Upstream divides by softplus(a), which gives NaN at -110 in float32 and at -12 in float16."""
    mixer, cfg = make_mixer(bias=True)
    with torch.no_grad():
        mixer.in_proj.weight[-4:] = 0
        mixer.in_proj.bias[-4:] = a
    hidden = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(4))
    hidden, mixer = hidden.to(dtype), mixer.to(dtype)
    found = mixer(hidden)
    assert torch.isfinite(found).all()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert relative_error(found, recurrence(mixer, cfg, hidden)) < tolerance


def test_a_short_memory_after_a_long_one_is_exact():
    """Differences of one running sum would lose the small decays that follow a very large one."""
    log_decay = torch.full((1, 40, 1), -1e-3)
    log_decay[:, 3] = -30000.0
    x = torch.randn(1, 40, 1, 4, generator=torch.Generator().manual_seed(5))
    B, C = (torch.randn(1, 40, 1, 3, generator=torch.Generator().manual_seed(seed)) for seed in (6, 7))
    exact = ssd.scan(x.double(), log_decay.double(), B.double(), C.double(), 64)
    found = ssd.scan(x, log_decay, B, C, 64)
    for left, right in zip(found, exact, strict=True):
        assert relative_error(left, right) < 1e-5


def test_state_is_float32_whatever_the_weights():
    x, B = torch.randn(1, 5, 2, 4).bfloat16(), torch.randn(1, 5, 1, 3).bfloat16()
    y, state = ssd.scan(x, torch.zeros(1, 5, 2), B, B, 4)
    assert y.dtype == state.dtype == torch.float32


def test_steps_continue_a_scan():
    generator = torch.Generator().manual_seed(8)
    x, B, C = (torch.randn(2, 13, *shape, generator=generator) for shape in ((4, 3), (2, 5), (2, 5)))
    log_decay = -F.softplus(torch.randn(2, 13, 4, generator=generator))
    whole, final = ssd.scan(x, log_decay, B, C, 4)
    _, state = ssd.scan(x[:, :6], log_decay[:, :6], B[:, :6], C[:, :6], 4)
    for t in range(6, 13):
        y, state = ssd.step(x[:, t], log_decay[:, t], B[:, t], C[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(dtype):
    mixer, cfg = make_mixer(d_model=64)
    hidden = torch.randn(2, 150, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    wanted = recurrence(mixer.to(dtype), cfg, hidden)
    found = mixer.cuda()(hidden.cuda()).cpu()
    assert relative_error(found, wanted) < {torch.float32: 1e-3, torch.bfloat16: 4e-2}[dtype]
