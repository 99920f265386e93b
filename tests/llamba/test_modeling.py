"""The model as transformers knows it: saving, loading, published layouts, training, device maps."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.mixer import CausalConv1d
from tests.conftest import VOCABULARY, on_devices, seeded, tiny_config, tiny_llama_cfg

IDS = torch.arange(14).view(2, 7) * 11 % VOCABULARY


def hybrid(**changes) -> LlambaForCausalLM:
    return seeded(LlambaForCausalLM(tiny_config(llama_layers=[1, 3], llama_cfg=tiny_llama_cfg(), **changes)), seed=21)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    model = hybrid(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    for again in (LlambaForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(again, LlambaForCausalLM)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert (again.lm_head.weight is again.backbone.embedding.weight) is tied
    backbone = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(IDS).last_hidden_state, model.backbone(IDS).last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_published_layouts_load_as_they_are(tmp_path, layout, tied):
    """Upstream writes config.json without architectures, and no lm_head.weight where embeddings are tied."""
    config = tiny_config(tie_embeddings=tied)
    model = seeded(LlambaForCausalLM(config), seed=22)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
    write_published(tmp_path, config, state, layout)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def write_published(folder: Path, config: LlambaConfig, state: dict, layout: str) -> None:
    fields = ("vocab_size", "tie_embeddings", "pad_vocab_size_multiple", "lm_head_bias", "d_model", "n_layer")
    fields += ("resid_dropout", "norm_epsilon", "mlp_cfg", "ssm_cfg")
    published = {name: getattr(config, name) for name in fields}
    (folder / "config.json").write_text(json.dumps({"model_type": "llamba", **published}))
    stem, suffix = ("pytorch_model", "bin") if layout.startswith("bin") else ("model", "safetensors")
    save = torch.save if suffix == "bin" else save_file
    if not layout.endswith("shards"):
        save(state, folder / f"{stem}.{suffix}")
        return
    names = sorted(state)
    shards = {f"{stem}-{i + 1:05d}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save({name: state[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("fields", "tensors", "conv_dim", "in_rows"),
    [
        ({"d_model": 4096, "n_layer": 32, "intermediate": 14336, "tied": True}, 354, 8192, 12320),
        ({"d_model": 4096, "n_layer": 32, "intermediate": 14336, "tied": False}, 355, 8192, 12320),
        ({"d_model": 3072, "n_layer": 28, "intermediate": 8192, "tied": True}, 310, 7168, 10272),
        ({"d_model": 2048, "n_layer": 16, "intermediate": 8192, "tied": True}, 178, 6144, 8224),
    ],
    ids=["8B", "8B-untied", "3B", "1B"],
)
def test_names_and_shapes_of_the_published_models(fields, tensors, conv_dim, in_rows):
    width, layers, intermediate = fields["d_model"], fields["n_layer"], fields["intermediate"]
    config = LlambaConfig(
        d_model=width, n_layer=layers, tie_embeddings=fields["tied"], mlp_cfg={"intermediate_size": intermediate}
    )
    wanted = {"backbone.embedding.weight": [128256, width], "backbone.final_layernorm.weight": [width]}
    if not fields["tied"]:
        wanted["lm_head.weight"] = [128256, width]
    for index in range(layers):
        prefix = f"backbone.layers.{index}."
        wanted |= {
            prefix + "mixer.z_bias": [width],
            prefix + "mixer.D": [32],
            prefix + "mixer.in_proj.weight": [in_rows, width],
            prefix + "mixer.conv1d.weight": [conv_dim, 1, 4],
            prefix + "mixer.conv1d.bias": [conv_dim],
            prefix + "mixer.out_proj.weight": [width, width],
            prefix + "input_layernorm.weight": [width],
            prefix + "post_attention_layernorm.weight": [width],
            prefix + "mlp.gate_proj.weight": [intermediate, width],
            prefix + "mlp.up_proj.weight": [intermediate, width],
            prefix + "mlp.down_proj.weight": [width, intermediate],
        }
    found = {name: list(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    assert found == wanted
    assert len(found) == tensors


def test_grafted_layers_are_transformers_own():
    layers = hybrid().backbone.layers
    assert [type(layer) is LlamaDecoderLayer for layer in layers] == [False, True, False, True]


def test_the_two_epsilons():
    config = tiny_config(norm_epsilon=1e-3, llama_layers=[0], llama_cfg={**tiny_llama_cfg(), "rms_norm_eps": 1e-2})
    backbone = LlambaForCausalLM(config).backbone
    assert backbone.final_layernorm.variance_epsilon == 1e-3
    assert backbone.layers[0].input_layernorm.variance_epsilon == 1e-2
    assert backbone.layers[1].input_layernorm.variance_epsilon == 1e-5
    assert backbone.layers[1].post_attention_layernorm.variance_epsilon == 1e-5


def enable_checkpointing(model) -> None:
    """Call the method by the name that it has in the installed transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_lowers_the_loss(checkpointing):
    model = hybrid().train()
    if checkpointing:
        enable_checkpointing(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_gradients_are_those_of_finite_differences():
    model = hybrid().double().train()
    ids = IDS[:1, :5]
    for name in ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.2.mixer.conv1d.weight"):
        parameter = model.get_parameter(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        flat = parameter.data.view(-1)
        place = int(parameter.grad.abs().argmax())
        losses = []
        for delta in (1e-3, -2e-3):
            flat[place] += delta
            losses.append(model(ids, labels=ids).loss.item())
        flat[place] += 1e-3
        slope = (losses[0] - losses[1]) / 2e-3
        # transformers' norms work in float32, which limits how close the two can be.
        assert slope == pytest.approx(parameter.grad.view(-1)[place].item(), rel=1e-2)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = hybrid().train()
        if checkpointing:
            enable_checkpointing(model)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.backbone.layers[0].mixer.in_proj.weight.grad)
    assert torch.equal(*gradients)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    model, ids = hybrid(), IDS.to(device)
    wanted = model(IDS).logits
    model = model.to(device)
    torch.testing.assert_close(model(ids).logits.cpu(), wanted, rtol=1e-4, atol=1e-4)
    found = model.to(dtype)(ids).logits
    assert found.dtype == dtype
    assert ((found.float().cpu() - wanted).abs().max() / wanted.std()).item() < 0.2
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None, pad_token_id=0).shape == (2, 10)


def test_logits_to_keep_and_hidden_states():
    model = hybrid()
    out = model(IDS, output_hidden_states=True)
    # Not bit by bit: a product of fewer rows may sum in another order.
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, out.logits[:, -1:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 4])).logits, out.logits[:, [0, 4]])
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], model.backbone.embedding(IDS))


def test_embeddings_in_place_of_ids():
    model = hybrid()
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(IDS).logits)


def test_a_device_map_never_splits_a_layer():
    model = empty_model(hybrid().config)
    layer_bytes = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in model.backbone.layers)
    limit = 4 * layer_bytes
    assert set(model._no_split_modules) == {"LlambaDecoderLayer", "LlamaDecoderLayer"}
    whole = list(model._no_split_modules)  # accelerate 1.10 takes no set
    placed = infer_auto_device_map(model, {0: limit, 1: limit, "cpu": 10**9}, no_split_module_classes=whole)
    assert not [name for name in placed if name.startswith("backbone.layers.") and name.count(".") > 2]
    assert len(set(placed.values())) > 1


@on_devices
@pytest.mark.parametrize("room", ["for all", "for half"])
def test_device_map_auto_loads(tmp_path, device, room):
    """Layers that do not fit on the device are on the disk until they run."""
    model = hybrid()
    model.save_pretrained(tmp_path)
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    limit = {0 if device == "cuda" else device: size_bytes * 2 if room == "for all" else size_bytes // 2}
    options = {"device_map": "auto", "max_memory": limit, "offload_folder": tmp_path / "offloaded"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert (torch.device("meta") in {parameter.device for parameter in again.parameters()}) == (room == "for half")
    ids = IDS.to(device)
    torch.testing.assert_close(again(ids).logits.cpu(), model(IDS).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options).cpu(), model.generate(IDS, **options))


@torch.no_grad()
def test_a_pickle_of_version_0_1_loads(tmp_path):
    """Its mixers have torch's own convolution. Our forward calls a convolution with other arguments."""
    model = hybrid()
    wanted = model(IDS).logits
    for module in model.modules():
        if isinstance(module, CausalConv1d):
            module.__class__ = torch.nn.Conv1d
    torch.save(model, tmp_path / "model.pt")
    for weights_only in (True, False):
        again = torch.load(tmp_path / "model.pt", weights_only=weights_only)
        assert torch.equal(again(IDS).logits, wanted)
