"""Small diffusers transformers of random weights and odd sizes, and what a call of each is given.

    field, noise = field_of("sd3", n=3, guidance=2.0)

Channels, patches, heads, frames, height and width differ from each other wherever the class lets them, so that outputs
in the wrong order have another shape or other values.
"""

import diffusers
import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk


def randomised(net, seed=0):
    """Every parameter random: an untrained DiT predicts zero, which any head would match."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 4))
            if "norm" in name and name.endswith("weight") and p.dim() == 1:
                p.add_(1)
    return net.eval()


def text(n, tokens=5, width=20, seed=1):
    return dict(encoder_hidden_states=normal(n, tokens, width, seed=seed))


def pooled(n, width=12, seed=2):
    return dict(pooled_projections=normal(n, width, seed=seed))


def masked(n, tokens=5, width=20, seed=1):
    return text(n, tokens, width, seed) | dict(encoder_attention_mask=torch.ones(n, tokens, dtype=torch.bool))


def ids(rows, columns, tokens, width=3):
    grid = [torch.zeros(1)] * (width - 2 if width == 3 else 1) + [
        torch.arange(float(rows)),
        torch.arange(float(columns)),
    ]
    grid += [torch.zeros(1)] * (width - len(grid))
    return dict(img_ids=torch.cartesian_prod(*grid), txt_ids=torch.zeros(tokens, width))


IDS = ("img_ids", "txt_ids")
SIGMA = dict(reverse_time=True, x_name="hidden_states", time_name="timestep")
THOUSANDTHS = dict(SIGMA, time_scale=1000)


def sd3(n):
    net = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
    )
    return net, THOUSANDTHS, text(n) | pooled(n), text(1, seed=3) | pooled(1, seed=4), (4, 8, 12)


def flux(n):
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    rows = text(n, 7) | pooled(n) | ids(4, 6, 7)
    return net, dict(SIGMA, shared=IDS), rows, text(1, 7, seed=3) | pooled(1, seed=4), (24, 16)


def dit(n, out_channels=4):
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=10,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=7,
        norm_num_groups=2,
    )
    rows, other = dict(class_labels=torch.arange(n) % 7), dict(class_labels=torch.tensor([6]))
    convention = dict(time_scale=1000, x_name="hidden_states", time_name="timestep", sign=-1)
    return net, convention, rows, other, (4, 8, 8)


def flux2(n):
    net = diffusers.Flux2Transformer2DModel(
        in_channels=12,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return net, dict(SIGMA, shared=IDS), text(n, 7) | ids(3, 5, 7, width=4), text(1, 7, seed=3), (15, 12)


def qwenimage(n):
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=12,
        out_channels=3,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 8),
    )
    return net, SIGMA, text(n) | dict(img_shapes=[(1, 3, 5)]), text(1, seed=3), (15, 12)


def wan(n):
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=5,
        out_channels=5,
        text_dim=20,
        freq_dim=32,
        ffn_dim=28,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return net, THOUSANDTHS, text(n), text(1, seed=3), (5, 3, 4, 10)


def ltx(n):
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=20,
    )
    rows = masked(n) | dict(num_frames=2, height=3, width=5)
    return net, THOUSANDTHS, rows, masked(1, seed=3), (30, 6)


def sana(n):
    net = diffusers.SanaTransformer2DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=3,
        cross_attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
    )
    return net, THOUSANDTHS, text(n), text(1, seed=3), (5, 3, 7)


def lumina2(n):
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=5,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=20,
    )
    ragged = torch.arange(6) < 4 + torch.arange(n)[:, None] % 3  # lengths of 4, 5 and 6
    rows = text(n, 6) | dict(encoder_attention_mask=ragged.long())
    other = text(1, 6, seed=3) | dict(encoder_attention_mask=(torch.arange(6) < 3)[None].long())
    return net, dict(x_name="hidden_states", time_name="timestep", sign=1), rows, other, (5, 4, 6)


class Lists(nn.Module):
    """Z-Image takes and gives lists of samples."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, captions):
        return torch.stack(self.net(list(x[:, :, None]), t, list(captions)).sample)[:, :, 0]


def zimage(n):
    net = diffusers.ZImageTransformer2DModel(
        in_channels=5,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )
    captions = (dict(captions=normal(k, 5, 20, seed=seed)) for k, seed in ((n, 1), (1, 3)))
    return Lists(net), dict(sign=-1), *captions, (5, 4, 6)


def cogview4(n):
    net = diffusers.CogView4Transformer2DModel(
        in_channels=5,
        out_channels=5,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        text_embed_dim=20,
        time_embed_dim=12,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    sizes = dict(original_size=torch.tensor([[64.0, 48.0]]), target_size=torch.tensor([[64.0, 48.0]]))
    rows = text(n) | sizes | dict(crop_coords=torch.zeros(1, 2))
    return net, THOUSANDTHS, rows, text(1, seed=3), (5, 4, 6)


def mochi(n):
    net = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=5,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=16,
    )
    convention = dict(time_scale=1000, x_name="hidden_states", time_name="timestep", sign=1)
    return net, convention, masked(n, 16, 32), masked(1, 16, 32, seed=3), (5, 3, 4, 6)


def hidream(n):
    net = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=5,
        out_channels=5,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[20, 12],
        text_emb_dim=12,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )

    def rows(n, seed):
        llama = normal(n, 2, 5, 12, seed=seed).transpose(0, 1).contiguous()
        return dict(
            encoder_hidden_states_t5=normal(n, 5, 20, seed=seed),
            encoder_hidden_states_llama3=llama,
            pooled_embeds=normal(n, 12, seed=seed),
        )

    convention = dict(THOUSANDTHS, time_name="timesteps", shared=("encoder_hidden_states_llama3",))  # layers come first
    return net, convention, rows(n, 1), rows(n, 3), (5, 4, 6)


def auraflow(n):
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=5,
        out_channels=5,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pos_embed_max_size=64,
    )
    return net, SIGMA, text(n), text(1, seed=3), (5, 4, 6)


def hunyuanvideo(n):
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 4, 4),
        guidance_embeds=False,
    )
    return net, THOUSANDTHS, masked(n) | pooled(n), masked(1, seed=3) | pooled(1, seed=4), (5, 3, 4, 6)


def hunyuanimage(n):
    net = diffusers.HunyuanImageTransformer2DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=20,
        rope_axes_dim=(4, 4),
    )
    return net, THOUSANDTHS, masked(n), masked(1, seed=3), (5, 3, 7)


def pixart(n):
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=5,
        out_channels=5,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=8,
        norm_num_groups=1,
        caption_channels=20,
        use_additional_conditions=False,
    )
    convention = dict(time_scale=1000, x_name="hidden_states", time_name="timestep", sign=-1)
    return net, convention, text(n), text(1, seed=3), (5, 4, 6)


def chroma(n):
    net = diffusers.ChromaTransformer2DModel(
        in_channels=12,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    rows = text(n, 7) | ids(3, 5, 7)
    return net, dict(SIGMA, shared=IDS), rows, text(1, 7, seed=3), (15, 12)


def cosmos(n):
    net = diffusers.CosmosTransformer3DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    return net, SIGMA, text(n), text(1, seed=3), (5, 3, 4, 6)


def prx(n):
    net = diffusers.PRXTransformer2DModel(
        in_channels=5,
        context_in_dim=20,
        hidden_size=24,
        num_heads=2,
        depth=1,
        axes_dim=[6, 6],
    )
    return net, SIGMA, text(n), text(1, seed=3), (5, 4, 6)


def kandinsky5(n):
    net = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=5,
        out_visual_dim=5,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=8,
        model_dim=24,
        ff_dim=28,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
    )
    positions = dict(visual_rope_pos=tuple(map(torch.arange, (3, 2, 3))), text_rope_pos=torch.arange(5))
    rows, other = text(n) | pooled(n) | positions, text(1, seed=3) | pooled(1, seed=4)
    return net, dict(THOUSANDTHS, shared=tuple(positions)), rows, other, (3, 4, 6, 5)


def omnigen(n):
    net = diffusers.OmniGenTransformer2DModel(
        in_channels=5,
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=28,
        num_layers=1,
        pad_token_id=0,
        vocab_size=30,
        rope_scaling=dict(long_factor=[1.0] * 6, short_factor=[1.0] * 6),
        pos_embed_max_size=8,
        time_step_dim=8,
    )
    length = 4 + 1 + 6  # words, time, patches
    given = dict(input_img_latents=[], input_image_sizes={}, position_ids=torch.arange(length)[None])
    given |= dict(attention_mask=torch.ones(1, length, length))
    convention = dict(x_name="hidden_states", time_name="timestep", sign=1)
    words = (dict(input_ids=torch.arange(4)[None] + torch.arange(k)[:, None] + first) for k, first in ((n, 1), (1, 9)))
    rows, other = words
    return net, convention, rows | given, other, (5, 4, 6)


def acestep(n):
    net = diffusers.AceStepTransformer1DModel(
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        in_channels=15,
        audio_acoustic_hidden_dim=5,
        encoder_hidden_size=20,
    )
    rows = text(n) | dict(timestep_r=torch.zeros(1), context_latents=normal(1, 8, 10))
    return net, SIGMA, rows, text(1, seed=3), (8, 5)


TRANSFORMERS = {
    f.__name__: f
    for f in (
        *(
            sd3,
            flux,
            flux2,
            qwenimage,
            chroma,
            dit,
            pixart,
            sana,
            lumina2,
            zimage,
            cogview4,
            hidream,
            auraflow,
            omnigen,
        ),
        *(wan, ltx, mochi, hunyuanvideo, hunyuanimage, cosmos, prx, kandinsky5),
    )
}
REFUSED = {"acestep": acestep}


def field_of(name, n, guidance=None, packed=True, dtype=None):
    try:
        net, convention, rows, other, shape = (TRANSFORMERS | REFUSED)[name](n)
    except AttributeError as e:
        if not str(e).startswith("module diffusers has no attribute"):
            raise
        pytest.skip(f"diffusers {diffusers.__version__} has no such transformer")
    randomised(net)
    if dtype is not None:
        net = net.to(dtype)
        rows, other = (
            {
                k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and "ids" not in k else v
                for k, v in kw.items()
            }
            for kw in (rows, other)
        )
    guided = {} if guidance is None else dict(guidance=guidance, unconditional=other, packed=packed)
    field = fk.VelocityField(net, **convention, conditioning=rows, **guided, dtype=dtype)
    return field, normal(n, *shape, seed=9)
