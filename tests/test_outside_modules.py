"""Modules from outside: an activation made at import, for all, that no model holds; models of other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

activation = nn.GELU()


class Head(nn.Module):
    """A head as RoBERTa's: the activation between its layers is no child of it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(activation(self.dense(x))))


@pytest.mark.parametrize("tp", [2, 4])
def test_a_call_of_a_module_outside_of_the_model_is_its_callers(tp: int) -> None:
    inputs = (torch.randn(2, 3, 16, dtype=torch.float64),)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Head(), nn.Linear(32, 16)).double()

    made = plan(build(), inputs, tp=tp, phase="train")
    report = verify(build, inputs, made)
    assert made.sharded_fraction > 0.9
    assert report.ok(), report.explain()


# --- packages that none of us wrote; each is skipped where it is not installed

Made = tuple[Any, Any]  # a function that builds, and its inputs
PACKAGES: dict[str, tuple[str, Callable[[], Made]]] = {}


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ids(length: int = 16) -> tuple[torch.Tensor]:
    return (torch.arange(2 * length).view(2, length),)


def outside(package: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(made: Callable[[], Made]) -> Callable[[], Made]:
        PACKAGES[made.__name__] = package, made
        return made

    return add


def conditioned(**more: Any) -> dict[str, Any]:
    return {"timestep": torch.tensor([3, 7]), "return_dict": False, **more}


@outside("diffusers")
def dit() -> Made:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    more = {"sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
    given = conditioned(hidden_states=r(2, 4, 8, 8), class_labels=torch.tensor([1, 2]))
    return lambda: DiTTransformer2DModel(**sizes, **more), given


@outside("diffusers")
def flux() -> Made:
    from diffusers import FluxTransformer2DModel

    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 12}
    more = {"num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 24}
    given = conditioned(
        hidden_states=r(2, 16, 16), encoder_hidden_states=r(2, 6, 32), pooled_projections=r(2, 24),
        img_ids=r(16, 3), txt_ids=torch.zeros(6, 3), timestep=torch.tensor([0.5, 0.7]),
    )  # fmt: skip
    return lambda: FluxTransformer2DModel(**sizes, **more, axes_dims_rope=(4, 4, 4)), given


@outside("diffusers")
def sd3() -> Made:
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8}
    more = {"num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32}
    given = conditioned(hidden_states=r(2, 4, 8, 8), encoder_hidden_states=r(2, 6, 32), pooled_projections=r(2, 24))
    return (
        lambda: SD3Transformer2DModel(**sizes, **more, pooled_projection_dim=24, pos_embed_max_size=16),
        given,
    )


@outside("diffusers")
def unet() -> Made:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return (
        lambda: UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
            down_block_types=down, up_block_types=up,
        ),
        {"sample": r(1, 3, 8, 8), "timestep": torch.tensor([3]), "return_dict": False},
    )  # fmt: skip


@outside("diffusers")
def prior() -> Made:
    from diffusers import PriorTransformer

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 16}
    given = conditioned(hidden_states=r(2, 16), proj_embedding=r(2, 16), encoder_hidden_states=r(2, 7, 16))
    return lambda: PriorTransformer(**sizes, num_embeddings=7, additional_embeddings=4), given


@outside("x_transformers")
def decoder_of_lists() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
    return lambda: TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=Decoder(**layers)), ids()


@outside("x_transformers")
def encoder_with_alibi() -> Made:
    from x_transformers import Encoder, TransformerWrapper

    layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "alibi_pos_bias": True, "attn_qk_norm": True}
    return lambda: TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=Encoder(**layers)), ids()


@outside("x_transformers")
def vision() -> Made:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
    return (
        lambda: ViTransformerWrapper(image_size=16, patch_size=4, num_classes=12, attn_layers=Encoder(**layers)),
        (r(2, 3, 16, 16),),
    )


@outside("perceiver_pytorch")
def perceiver_io() -> Made:
    from perceiver_pytorch import PerceiverIO

    sizes = {"dim": 16, "queries_dim": 32, "depth": 2, "num_latents": 8, "latent_dim": 32}
    heads = {"cross_heads": 2, "latent_heads": 4, "cross_dim_head": 8, "latent_dim_head": 8}
    return lambda: PerceiverIO(**sizes, **heads), (r(2, 10, 16),)


@outside("linformer")
def linformer() -> Made:
    from linformer import LinformerLM

    return lambda: LinformerLM(num_tokens=64, dim=32, seq_len=16, depth=2, heads=4, dim_head=8, k=8), ids()


@outside("linear_attention_transformer")
def linear_attention() -> Made:
    from linear_attention_transformer import LinearAttentionTransformerLM

    return lambda: LinearAttentionTransformerLM(num_tokens=64, dim=32, heads=4, depth=2, max_seq_len=16), ids()


@outside("conformer")
def conformer() -> Made:
    from conformer import Conformer

    sizes = {"dim": 32, "depth": 2, "dim_head": 8, "heads": 4, "ff_mult": 2, "conv_kernel_size": 5}
    return lambda: Conformer(**sizes), (r(2, 16, 32),)


@outside("mlp_mixer_pytorch")
def mlp_mixer() -> Made:
    from mlp_mixer_pytorch import MLPMixer

    sizes = {"image_size": 16, "channels": 3, "patch_size": 4, "dim": 32, "depth": 2, "num_classes": 12}
    return lambda: MLPMixer(**sizes), (r(2, 3, 16, 16),)


@outside("g_mlp_pytorch")
def gmlp() -> Made:
    from g_mlp_pytorch import gMLP

    return lambda: gMLP(num_tokens=64, dim=32, depth=2, seq_len=16, heads=1, prob_survival=1.0), ids()


@outside("mambapy")
def mamba() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return lambda: Mamba(MambaConfig(d_model=32, n_layers=2, pscan=False)), (r(2, 8, 32),)


@outside("mambapy")
def mamba_by_a_scan_in_place() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return lambda: Mamba(MambaConfig(d_model=32, n_layers=2, pscan=True)), (r(2, 8, 32),)


@outside("pytorch_tcn")
def temporal_convolutions() -> Made:
    from pytorch_tcn import TCN

    return lambda: TCN(num_inputs=8, num_channels=[16, 32], kernel_size=3, causal=True), (r(2, 8, 20),)


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_that_none_of_us_wrote(name: str) -> None:
    package, made = PACKAGES[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    make, inputs = made()

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = make().double()
        return model

    p = plan(build(), inputs, tp=2, phase="train")
    report = verify(build, inputs, p)
    assert p.sharded_fraction > 0.9, p.unsplit
    assert report.ok(), report.explain()
