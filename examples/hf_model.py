"""A Hugging Face model from its configuration, planned and run on 2 CPU ranks:  python examples/hf_model.py"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from colrow.planner import Plan, plan
from colrow.rewrite import parallelize
from colrow.rewrite.ranks import run_ranks

RANKS = 2
CONFIG = Qwen3Config(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    head_dim=16, vocab_size=1000,
)  # fmt: skip
PROMPT = torch.tensor([[11, 42, 7, 300]])


def build() -> torch.nn.Module:
    """The same model on every rank; `AutoModelForCausalLM.from_pretrained` would do as well."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


def generate(model: torch.nn.Module) -> list[int]:
    """Twelve tokens, by the model's own `generate`."""
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0].tolist()


def on_rank(p: Plan) -> list[int]:
    """What runs on each of the ranks; under torchrun this would be the whole script."""
    model = parallelize(build(), p)
    if dist.get_rank() == 0:
        mine = model.model.layers[0].mlp.down_proj.weight.to_local()
        print("rank 0 holds", tuple(mine.shape), "of a down projection of", (CONFIG.hidden_size, 384))
    return generate(model)


def main() -> None:
    """Plan, run, compare; fails if a token differs from the dense model's."""
    # A returned KV cache would have to be whole, as every output is; the plan made without one generates with one.
    p = plan(build(), {"input_ids": PROMPT, "use_cache": False}, tp=RANKS, hardware="gloo-cpu")
    print(p.count("all_reduce", direction="forward", category="block"), "all-reduces in the blocks")
    ranks, dense = run_ranks(on_rank, RANKS, "gloo", (p,)), generate(build())
    print("generated", ranks[0])
    assert ranks == [dense] * RANKS, f"the dense model says {dense}"
    print("the ranks' tokens are the dense model's")


if __name__ == "__main__":
    main()
