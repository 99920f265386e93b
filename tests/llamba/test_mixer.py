"""The mixer against an independent computation: upstream's recurrence, token by token, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_preparation.llamba import mixer as mixer_module
from model_preparation.llamba import ssd
from model_preparation.llamba.cache_llamba import LlambaCache
from model_preparation.llamba.mixer import LlambaMixer, PaddingLayout
from tests.conftest import on_devices, seeded, tiny_config


def recurrence(mixer: LlambaMixer, ssm: dict, hidden: Tensor) -> Tensor:
    """The output (batch, length, d_model), computed from the definition, token by token and head by head."""
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
    assert relative_error(mixer(hidden), recurrence(mixer, cfg, hidden)) < 3e-5


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


@pytest.mark.parametrize("devices", [ssd.HAVE_FLOAT64, ()], ids=["float64", "no float64"])
def test_a_short_memory_after_a_long_one_is_exact(monkeypatch, devices):
    """Differences of one float32 running sum would lose the small decays that follow a very large one."""
    monkeypatch.setattr(ssd, "HAVE_FLOAT64", devices)
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


def random_scan(length: int, batch: int = 2, H: int = 4, G: int = 2) -> tuple[Tensor, ...]:
    """x, log_decay, B, C, an initial state and D."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((batch, length, H, 3), (batch, length, H), (batch, length, G, 5), (batch, length, G, 5))
    x, a, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    state, D = torch.randn(batch, H, 3, 5, generator=generator), torch.randn(H, generator=generator)
    return x, -F.softplus(a), B, C, state, D


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 60), chunk_size=st.integers(1, 20), data=st.data())
def test_a_scan_may_be_split_anywhere(length, chunk_size, data):
    x, log_decay, B, C, state, D = random_scan(length)
    whole, final = ssd.scan(x, log_decay, B, C, chunk_size, state, D)
    middle = data.draw(st.integers(1, length - 1))
    parts = []
    for part in (slice(0, middle), slice(middle, None)):
        y, state = ssd.scan(x[:, part], log_decay[:, part], B[:, part], C[:, part], chunk_size, state, D)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole.double()) < 1e-5
    assert relative_error(state, final.double()) < 1e-5


def test_infinite_decay_forgets_all():
    """softplus of an overflowed a is inf: the state before is gone, the token's own input is not."""
    x, log_decay, B, C, state, _ = random_scan(12)
    log_decay[:, 6] = -torch.inf
    y, final = ssd.scan(x, log_decay, B, C, 8, state)
    again, final_again = ssd.scan(x[:, 6:], log_decay[:, 6:], B[:, 6:], C[:, 6:], 8)
    torch.testing.assert_close(y[:, 6:], again)
    torch.testing.assert_close(final, final_again)


def test_a_step_is_in_place_only_without_gradients():
    x, log_decay, B, C, state, D = random_scan(1)
    arguments = (x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0])
    kept = state.clone()
    y, new = ssd.step(*arguments, state.requires_grad_(), D)
    torch.testing.assert_close(state, kept)
    (y.sum() + new.sum()).backward()
    with torch.no_grad():
        in_place, again = ssd.step(*arguments, state, D)
    assert again.data_ptr() == state.data_ptr()
    torch.testing.assert_close(in_place, y)
    torch.testing.assert_close(again, new)


@pytest.mark.parametrize("block_tokens", [1, 7, 16])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_blocks_change_nothing(monkeypatch, block_tokens, padded):
    """Blocks of rows and of tokens, over padding, and a cache that goes on after them."""
    mixer, cfg = make_mixer()
    config = tiny_config(d_model=32, n_layer=1, ssm_cfg=cfg)
    hidden = torch.randn(5, 23, 32, generator=torch.Generator().manual_seed(10))
    mask = torch.ones(5, 23, dtype=torch.int64)
    if padded:
        mask[1, :9], mask[2, 3:], mask[3, 20:], mask[4, 5:12] = 0, 0, 0, 0
    padding, more = PaddingLayout.of(mask, 23), torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(11))

    def run() -> tuple[Tensor, ...]:
        cache = LlambaCache(config)
        out = mixer(hidden, cache, padding)[mask.bool()]
        return (out, mixer(more, cache), mixer(more, cache), *cache.layers[0].states())

    whole = run()
    monkeypatch.setattr(mixer_module, "BLOCK_TOKENS", block_tokens)
    for found, wanted in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ssm", [{}, {"n_qk_heads": 2, "activation": "silu"}], ids=str)
def test_gradients_of_blocks_are_those_of_float64(monkeypatch, ssm):
    """float64 uses another convolution and one block. test_modeling checks its gradients by finite differences."""
    mixer, _ = make_mixer(**ssm)
    hidden = torch.randn(3, 21, 32, generator=torch.Generator().manual_seed(12))

    def gradients(mixer: LlambaMixer, hidden: Tensor) -> list[Tensor]:
        hidden = hidden.clone().requires_grad_()
        return list(torch.autograd.grad(mixer(hidden).square().sum(), [hidden, *mixer.parameters()]))

    monkeypatch.setattr(mixer_module, "BLOCK_TOKENS", 10)
    found = gradients(mixer, hidden)
    monkeypatch.undo()
    for left, right in zip(found, gradients(mixer.double(), hidden.double()), strict=True):
        assert relative_error(left, right) < 1e-4


def test_bfloat16_stays_near_its_own_rounding():
    mixer, cfg = make_mixer(d_model=128, d_state=64, bias=True)
    hidden = torch.randn(1, 300, 128, generator=torch.Generator().manual_seed(13)).bfloat16()
    wanted = recurrence(mixer.bfloat16(), cfg, hidden)
    with torch.no_grad():
        error = (mixer(hidden).double() - wanted).square().mean().sqrt() / wanted.std()
    assert error < 0.01  # rounding `wanted` alone gives 0.0017


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["flash-linear-attention", "mamba-ssm"])
def test_optional_kernels_compute_the_same(kernel, dtype):
    """mamba-ssm multiplies x by softplus(a), so it gets x / softplus(a). Here softplus(a) is at least 0.1."""
    generator = torch.Generator().manual_seed(14)
    x, B, C = (torch.randn(2, 150, 4, width, generator=generator) for width in (64, 64, 64))
    rate, D = (
        F.softplus(torch.randn(2, 150, 4, generator=generator)).clamp(min=0.1),
        torch.randn(4, generator=generator),
    )
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    state = torch.randn(2, 4, 64, 64, generator=generator)
    wanted = ssd.scan(x.double(), -rate.double(), B.double(), C.double(), 64, state.double(), D.double())
    x, B, C, rate, D, state = (t.cuda() for t in (x, B, C, rate, D, state))
    if kernel == "mamba-ssm":
        combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        values, A = (x / rate.unsqueeze(-1)).to(dtype), -torch.ones(4, device="cuda")
        found = combined(values, rate, A, B, C, 64, D=None, initial_states=state, return_final_states=True)
        found = (found[0] + D.unsqueeze(-1) * x, found[1])
    else:
        pytest.importorskip("fla")
        found = ssd.scan(x, -rate, B, C, 64, state, D)
    exact = kernel == "flash-linear-attention" and dtype == torch.float32  # computed by our own scan
    for left, right in zip(found, wanted, strict=True):
        assert relative_error(left.cpu(), right) < (1e-4 if exact else 8e-2)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_computes_the_recurrence(dtype, device):
    mixer, cfg = make_mixer(d_model=64)
    hidden = torch.randn(2, 150, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    wanted = recurrence(mixer.to(dtype), cfg, hidden)
    found = mixer.to(device)(hidden.to(device)).cpu()
    assert relative_error(found, wanted) < {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
