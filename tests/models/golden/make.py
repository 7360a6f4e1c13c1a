"""Tiny random checkpoints made by transformers, and what torch computes with them.

`python tests/models/golden/make.py` (extra `oracle`) rewrites the folders beside this file; the
torch-free tests compare with them. The oracle tests make the same models anew, and more.
"""

from pathlib import Path
from typing import Any

import numpy as np

TOKENS_SHAPE = (2, 11)
SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 22}
# Written as transformers 4 does; 5 reads it too and writes `rope_parameters`.
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,  # the three bands all occur at this length
    },
}
LINEAR = {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}

# Name -> config.json. Those named like a model_type are kept as golden files.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | LLAMA3 | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": GROUPED | {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": GROUPED | LINEAR | {"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True},
    "gpt_neox": SIZES | {"model_type": "gpt_neox", "intermediate_size": 22, "rotary_pct": 0.5},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 22},
    "llama_untied_biased": GROUPED
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "qwen2_tied_linear": GROUPED | LINEAR | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3_biased": GROUPED | {"model_type": "qwen3", "head_dim": 4, "attention_bias": True},
    "gpt_neox_sequential": SIZES
    | {
        "model_type": "gpt_neox",
        "intermediate_size": 22,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
        "rotary_pct": 1.0,
        "rotary_emb_base": 300.0,
        "rope_scaling": LINEAR["rope_scaling"],
    },
    "gpt_neox_unbiased": SIZES
    | {
        "model_type": "gpt_neox",
        "intermediate_size": 22,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "rotary_pct": 0.5,
    },
    "opt_untied_unbiased": SIZES
    | {
        "model_type": "opt",
        "ffn_dim": 22,
        "enable_bias": False,
        "tie_word_embeddings": False,
        "activation_function": "gelu_fast",
    },
}
GOLDEN = ("llama", "qwen2", "qwen3", "gpt_neox", "opt")


def make_model(name: str) -> Any:
    """A torch model in which every parameter, biases and norms too, is random and matters."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    config = VARIANTS[name]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **settings)
    )
    generator = torch.Generator().manual_seed(sorted(VARIANTS).index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(0.3 * noise + (1.0 if is_norm else 0.0))
    return model.eval()


def make_tokens() -> np.ndarray:
    """Token ids, int32 `[2, 11]`; the last id of the vocabulary occurs."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], TOKENS_SHAPE, np.int32)
    tokens[0, -1] = SIZES["vocab_size"] - 1
    return tokens


def run(model: Any) -> dict[str, np.ndarray]:
    """logits `[2, 11, 37]` and hidden `[num_layers + 1, 2, 11, 24]`, float32, as torch has them.

    hidden[k] is the residual stream after block k, but the last is the one after the final norm:
    that is what transformers gives.
    """
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        out = model(torch.tensor(make_tokens()), output_hidden_states=True)
    hidden = np.stack([state.numpy() for state in out.hidden_states])
    return {"logits": out.logits.numpy(), "hidden": hidden}


def main() -> None:
    from safetensors.numpy import save_file

    for name in GOLDEN:
        folder = Path(__file__).parent / name
        model = make_model(name)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        save_file(run(model), folder / "expected.safetensors")


if __name__ == "__main__":
    main()
