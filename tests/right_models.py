"""The models that issue 2 names, small, with what each block may reduce; and our own."""

from functools import cache

from colrow.planner.configurations import default_config
from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.planner.sources import Source, load_source, source_from_config

BATCH, SEQ = 2, 12
# All-reduces of a block, forward and backward, by where the block is; upper bounds (issue 2, "Counts").
BLOCK_COUNTS = {
    "llama": {"": (2, 2)},
    "gpt_neox": {"": (1, 1)},
    "qwen3": {"": (2, 2)},
    "gemma2": {"": (2, 2)},
    "gpt2": {"": (2, 2)},
    "phi3": {"": (2, 2)},
    "olmo2": {"": (2, 2)},
    "bert": {"": (2, 2)},
    "opt": {"": (2, 2)},
    "t5": {"encoder": (2, 2), "decoder": (3, 3)},
    "vit": {"": (2, 2)},
    "mixtral": {"": (2, 2)},
    "deepseek_v3": {"": (2, 4)},  # backward: 1 in the MoE, and what is cheapest for the low-rank projections
    "whisper": {"model.encoder": (2, 2), "model.decoder": (3, 3)},
}
# Without blocks: the whole model's.
OWN_BLOCK_COUNTS = {"mlp": {"": (1, 1)}, "transformer": {"": (2, 2)}, "two_towers": {"": (2, 2)}}
ONE_BACKWARD_MORE = {"t5", "whisper"}  # for the encoder's output, once per model


def source_of(name: str, phase: str = "train", labels: bool = False, dtype: str = "fp64") -> Source:
    """The small version of a model type, or one of ``examples/plain_models.py``."""
    if name in OWN_BLOCK_COUNTS:
        return load_source(f"examples.plain_models:{name}", phase=phase)
    config, model_class = default_config(name), None
    if name == "whisper":  # the head class of its type is the decoder alone
        from transformers import WhisperForConditionalGeneration as model_class

        config.max_source_positions = 2 * SEQ  # for 1500 the decoder is small beside the encoder
    if name == "mixtral":
        config.output_router_logits = True
    return source_from_config(
        config, model_class=model_class, phase=phase, batch=BATCH, seq=SEQ, dtype=dtype, small=True, labels=labels
    )


# Sizes that do not divide: fields of a Llama with 12 heads of 4 on a hidden size of 48, and the number of ranks.
AWKWARD = {
    "biases everywhere": ({"attention_bias": True, "mlp_bias": True}, 2),
    "tied head": ({"tie_word_embeddings": True}, 2),
    "vocab 50257, tied, on 4": ({"vocab_size": 50257, "tie_word_embeddings": True}, 4),
    "vocab 97 on 3": ({"vocab_size": 97}, 3),
    "2 kv heads on 4": ({"num_key_value_heads": 2}, 4),
    "6 heads on 4": ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}, 4),
    "6 q heads on 2 kv heads on 4": ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}, 4),
    "12 heads on 5": ({}, 5),
    "100 intermediate on 3": ({"intermediate_size": 100}, 3),
}


def awkward_source(fields: dict[str, object]) -> Source:
    """That Llama."""
    from transformers import LlamaConfig

    usual = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return source_from_config(LlamaConfig(**usual | fields), phase="train", batch=BATCH, seq=SEQ, dtype="fp64")


@cache
def planned_twin(name):
    """A model in float64 with random weights, and its plan for training on 2 ranks."""
    source = source_of(name)
    dense = randomize(source.build().double()).eval()
    return dense, plan(source.model, source.example_inputs, tp=2, phase="train")
