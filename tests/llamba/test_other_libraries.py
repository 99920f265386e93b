"""Models that accelerate, peft or a quantiser changed: the logits are right, or an error says why not."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from peft import LoHaConfig, LoraConfig, OFTConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import seeded, tiny_config, tiny_llama_cfg

# These warnings are about code in peft, torch and older versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|device type different)")

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
PLACES = ("backbone.embedding", "backbone.final_layernorm", "backbone.rotary_emb", "lm_head")


def hybrid(**changes) -> LlambaForCausalLM:
    return seeded(LlambaForCausalLM(tiny_config(llama_layers=[1, 3], llama_cfg=tiny_llama_cfg(), **changes)), seed=23)


def text(model) -> torch.Tensor:
    return model.generate(IDS[:, :7], max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    hybrid().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map", "load_checkpoint_and_dispatch"])
@torch.no_grad()
def test_offloaded_weights_give_the_same(how, saved, tmp_path):
    """The library accelerate loads a module's weights only while it computes, also the convolution's."""
    whole = hybrid()
    if how == "cpu_offload":
        model = cpu_offload(hybrid(), execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        model = disk_offload(hybrid(), tmp_path, execution_device=torch.device("cpu"))
    elif how == "device_map":
        places = {**dict.fromkeys(PLACES, "cpu"), "backbone.layers": "disk"}
        model = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    else:
        with init_empty_weights():
            empty = LlambaForCausalLM(whole.config)
        places = {**dict.fromkeys(PLACES, "cpu"), "backbone.layers": "disk"}
        model = load_checkpoint_and_dispatch(empty, saved, device_map=places, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    assert torch.equal(text(model), text(whole))


def adapted(config) -> torch.nn.Module:
    model = get_peft_model(hybrid(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "prompt" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=["in_proj", "q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        LoHaConfig(r=4, target_modules=["in_proj", "out_proj", "v_proj"], task_type="CAUSAL_LM"),
        OFTConfig(r=0, oft_block_size=16, target_modules=["out_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dora", "loha", "oft"],
)
@torch.no_grad()
def test_a_merged_adapter_computes_what_the_adapter_does(config):
    model = adapted(config)
    before, plain = model(input_ids=IDS).logits, hybrid()(IDS).logits
    assert (before - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize("layers", [[], [1, 3]])
def test_prompt_tuning_works_and_prefix_tuning_says_why_not(layers):
    # peft looks for an embedding of vocab_size rows, so the vocabulary must need no padding.
    config = tiny_config(vocab_size=256, llama_layers=layers, llama_cfg=tiny_llama_cfg() if layers else None)
    model = seeded(LlambaForCausalLM(config))
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    virtual = tuned.get_prompt(2)
    wanted = model(inputs_embeds=torch.cat([virtual, model.get_input_embeddings()(IDS)], 1)).logits
    torch.testing.assert_close(tuned(input_ids=IDS).logits, wanted)
    prefixed = get_peft_model(
        seeded(LlambaForCausalLM(config)), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="no place for the states of Mamba layers"):
        prefixed(input_ids=IDS)


@torch.no_grad()
def test_dynamically_quantised_linear_layers():
    """Every projection is called as a module, so that a quantiser may replace it; the logits stay near."""
    model, wanted = hybrid(), hybrid()(IDS).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is torch.nn.Linear for module in quantised.modules())
    found = quantised(IDS).logits
    assert not torch.equal(found, wanted)
    assert (found - wanted).square().mean() < 0.2 * wanted.var()
