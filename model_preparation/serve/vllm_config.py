"""Sets vLLM's configuration for a Llamba, and refuses the features of vLLM that a Llamba does not have."""

import math

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from model_preparation.serve.choose_engine import fault_of_model

logger = init_logger("vllm.model_preparation")  # a child of vLLM's logger prints as vLLM does


class LlambaArchitecture(ModelArchConfigConvertorBase):
    """The facts that vLLM reads from a Llamba's config."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """The longest sequence. Without grafted layers there is no limit, and vLLM takes its default of 2,048 tokens.

        vLLM reserves memory for every token, so a billion tokens, as in the config, would be too many.
        `--max-model-len` sets another length.
        """
        if not self.hf_config.llama_layers:
            return math.inf, None
        return super().derive_max_model_len_and_key()


class LlambaSettings(VerifyAndUpdateConfig):
    """vLLM calls this class with its whole configuration."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Change vLLM's configuration for the model, and refuse features that would give wrong tokens.

        Raises:
            ValueError: for a model that vLLM cannot serve, or a feature of vLLM that our layers do not have.
        """
        config = vllm_config.model_config.hf_config
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        if fault := fault_of_model(config.to_dict()):
            raise ValueError(fault)
        refused = {
            "tensor parallelism": parallel.tensor_parallel_size > 1,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "speculative decoding": vllm_config.speculative_config is not None,
            "quantization": vllm_config.quant_config is not None,
            "LoRA": vllm_config.lora_config is not None,
        }
        for feature, is_asked in refused.items():
            if is_asked:
                raise ValueError(
                    f"Llambas are served without {feature}: their Mamba layers do not support it. Leave it out."
                )
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"  # as in our own cache, for any dtype of the weights
        if cache.enable_prefix_caching:
            cache.enable_prefix_caching = False
            logger.info(
                "Prefix caching is off for Llambas. It copies Mamba states between blocks of the cache, and nobody "
                "tested that with Llambas. With other hybrid models, users report garbled text."
            )
        # Compilation and CUDA graphs were never tried with this model, so PyTorch runs it operation by operation.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
