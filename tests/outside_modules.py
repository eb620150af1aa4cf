"""Small modules of packages that none of us wrote and that need no torchvision: the `breadth` extra.

Each entry builds its module and gives inputs for it. Packages are imported when a module is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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


@outside("diffusers")
def pixart() -> Made:
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    more = {"cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8}
    sizes_of_images = {"resolution": None, "aspect_ratio": None}
    given = conditioned(
        hidden_states=r(2, 4, 8, 8), encoder_hidden_states=r(2, 5, 16), added_cond_kwargs=sizes_of_images
    )
    return lambda: PixArtTransformer2DModel(**sizes, **more), given


@outside("diffusers")
def wan() -> Made:
    from diffusers import WanTransformer3DModel

    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    more = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 32}
    norms = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    given = conditioned(hidden_states=r(1, 4, 2, 8, 8), encoder_hidden_states=r(1, 6, 16), timestep=torch.tensor([3]))
    return lambda: WanTransformer3DModel(**sizes, **more, **norms), given


@outside("x_transformers")
def encoder_and_decoder() -> Made:
    from x_transformers import XTransformer

    encoder = {"enc_num_tokens": 64, "enc_depth": 1, "enc_heads": 4, "enc_max_seq_len": 16}
    decoder = {"dec_num_tokens": 64, "dec_depth": 1, "dec_heads": 4, "dec_max_seq_len": 16}
    return lambda: XTransformer(dim=32, **encoder, **decoder), (*ids(), *ids(8))


@outside("perceiver_pytorch")
def perceiver_of_images() -> Made:
    from perceiver_pytorch import Perceiver

    sizes = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 2, "max_freq": 4.0, "depth": 2, "num_classes": 8}
    heads = {"cross_heads": 2, "latent_heads": 4, "cross_dim_head": 8, "latent_dim_head": 8}
    return lambda: Perceiver(**sizes, **heads, num_latents=4, latent_dim=16), (r(2, 6, 6, 3),)


@outside("performer_pytorch")
def performer() -> Made:
    from performer_pytorch import PerformerLM

    sizes = {"num_tokens": 64, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "max_seq_len": 16, "nb_features": 8}
    # Its projections are drawn anew after a number of steps kept in a buffer: a branch on data.
    return lambda: PerformerLM(**sizes, auto_check_redraw=False), ids()


@outside("local_attention")
def local_attention() -> Made:
    from local_attention import LocalTransformer

    sizes = {"num_tokens": 64, "dim": 32, "depth": 1, "heads": 4, "dim_head": 8, "max_seq_len": 16}
    return lambda: LocalTransformer(**sizes, local_attn_window_size=8, causal=True), ids()


@outside("memory_efficient_attention_pytorch")
def attention_in_buckets() -> Made:
    from memory_efficient_attention_pytorch import Attention

    buckets = {"memory_efficient": True, "q_bucket_size": 8, "k_bucket_size": 8}
    return lambda: Attention(dim=32, heads=4, dim_head=8, **buckets), (r(2, 16, 32),)


@outside("axial_attention")
def axial_attention() -> Made:
    from axial_attention import AxialAttention

    return lambda: AxialAttention(dim=16, dim_index=1, heads=4, num_dimensions=2), (r(2, 16, 6, 6),)


@outside("nystrom_attention")
def nystrom_attention() -> Made:
    from nystrom_attention import Nystromformer

    return lambda: Nystromformer(dim=32, depth=1, heads=4, dim_head=8, num_landmarks=4), (r(2, 16, 32),)


@outside("lambda_networks")
def lambda_layer() -> Made:
    from lambda_networks import LambdaLayer

    return lambda: LambdaLayer(dim=16, dim_out=32, r=3, dim_k=8, heads=4, dim_u=4), (r(2, 16, 8, 8),)


@outside("bottleneck_transformer_pytorch")
def bottlenecks() -> Made:
    from bottleneck_transformer_pytorch import BottleStack

    sizes = {"dim": 16, "fmap_size": 8, "dim_out": 32, "proj_factor": 4, "num_layers": 1, "heads": 4, "dim_head": 8}
    return lambda: BottleStack(**sizes, downsample=False), (r(2, 16, 8, 8),)


@outside("soft_moe_pytorch")
def experts_of_soft_slots() -> Made:
    from soft_moe_pytorch import DynamicSlotsSoftMoE

    return lambda: DynamicSlotsSoftMoE(dim=32, num_experts=4), (r(2, 16, 32),)


@outside("mega_pytorch")
def moving_averages() -> Made:
    from mega_pytorch import Mega

    sizes = {"num_tokens": 64, "dim": 32, "depth": 1, "ff_mult": 2, "ema_heads": 4}
    return lambda: Mega(**sizes, attn_dim_qk=16, attn_dim_value=32), ids()


@outside("rtdl_revisiting_models")
def tables_by_residuals() -> Made:
    from rtdl_revisiting_models import ResNet

    sizes = {"d_in": 16, "d_out": 8, "n_blocks": 2, "d_block": 32, "d_hidden": 64, "d_hidden_multiplier": None}
    return lambda: ResNet(**sizes, dropout1=0.0, dropout2=0.0), (r(8, 16),)


@outside("monai")
def medical_vision() -> Made:
    from monai.networks.nets import ViT

    image = {"in_channels": 1, "img_size": (16, 16), "patch_size": (4, 4), "spatial_dims": 2}
    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 4, "num_classes": 8}
    return lambda: ViT(**image, **sizes, classification=True), (r(2, 1, 16, 16),)


@outside("monai")
def medical_unet() -> Made:
    from monai.networks.nets import UNet

    sizes = {"in_channels": 2, "out_channels": 3, "channels": (8, 16, 32), "strides": (2, 2)}
    return lambda: UNet(spatial_dims=2, **sizes, num_res_units=1, norm="batch"), (r(2, 2, 16, 16),)
