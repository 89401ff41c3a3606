"""Generate with a small random DeepSeek-V4 of transformers, alone and with this library's index cache and selection.

    pip install "lightning-indexer[transformers]"
    python examples/transformers_generate.py          # seconds on a CPU; nothing is downloaded

With a trained model the only difference is `from_pretrained`.
"""

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from lightning_indexer.integrations.transformers import accelerate, agreement, restore

NEW_TOKENS = 12


def small_model() -> DeepseekV4ForCausalLM:
    """Layers SWA, CSA, HCA, CSA; a query keeps 32 entries of 4 tokens each."""
    torch.manual_seed(0)
    config = DeepseekV4Config(
        hidden_size=128,
        num_hidden_layers=4,
        compress_ratios=[0, 4, 128, 4],
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=8,
        index_head_dim=128,
        index_topk=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        vocab_size=256,
        eos_token_id=None,
    )
    model = DeepseekV4ForCausalLM(config).eval()
    for parameter in model.parameters():  # the default is so small that all logits are alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def main() -> None:
    torch.set_num_threads(1)  # the model is so small that threads would wait for one another
    model = small_model()
    prompts = torch.randint(256, (2, 500))  # 125 entries, of which attention sees 32 and the window
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    alone = model.generate(prompts, **options)

    with accelerate(model, index_format="fp32"):  # keys as they are in this model: the exact route
        exact = model.generate(prompts, **options)

    accelerate(model)  # mxfp4: 68 bytes per key instead of 512
    quantized = model.generate(prompts, **options)
    restore(model)

    print("model alone       ", alone[0, -NEW_TOKENS:].tolist())
    print("fp32 index keys   ", exact[0, -NEW_TOKENS:].tolist())
    print("mxfp4 index keys  ", quantized[0, -NEW_TOKENS:].tolist())
    print("fp32, same tokens:", "yes" if torch.equal(exact, alone) else "no")
    found = agreement(model, alone, index_format="mxfp4")
    shares = ", ".join(f"{share:.1%} in layer {layer}" for layer, share in found.entries.items())
    print(f"mxfp4, over the same tokens: {shares} of the entries selected, {found.tokens:.1%} of next tokens")


if __name__ == "__main__":
    main()
