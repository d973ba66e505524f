"""Pipelines of diffusers with tiny random models, made here from configurations: nothing is downloaded.

    family = tiny.FAMILIES["sd3"]
    pipe = family.make(seed=0, shift=2.0)               # the published scheduler, with another shift
    latents = pipe(**family.call(), num_inference_steps=4, output_type="latent").images

Sizes are what the pipelines' own arithmetic takes at least (latents divisible by patches, and so on); a call with two
prompts of unlike lengths and 4 steps takes a fraction of a second. Weights are random all over, final layers included,
which many models begin with at zero. Everything is float32 on the CPU.
"""

import dataclasses
import functools
from collections.abc import Callable

import diffusers
import torch
import transformers

PROMPTS = ["a fox", "two whales"]  # of unlike lengths
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
PAD, _, BOS, EOS = range(4)


def tokenizer(length: int, bos: bool = False, eos: bool = True, side: str = "right", chat: bool = False):
    """A token for each byte, between those that begin and end a text; at most `length` of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    ends = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    made.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        padding_side=side,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    if chat:
        fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return fast


VOCABULARY = 256 + len(SPECIAL)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, such that activations stay of the order of 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                p.normal_(1, 0.1)
            else:
                p.normal_(std=0.1)
    return module.eval()


def clip(width: int):
    return transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def t5(width: int, kind: str = "T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def image_vae(channels: int, **kwargs):
    """Images are twice as wide as latents."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **dict(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False) | kwargs,
    )


def sd3():
    return dict(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=image_vae(4),
        text_encoder=transformers.CLIPTextModelWithProjection(clip(16)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip(16)),
        text_encoder_3=t5(32),
        tokenizer=tokenizer(16, bos=True),
        tokenizer_2=tokenizer(16, bos=True),
        tokenizer_3=tokenizer(16),
    )


def flux():
    return dict(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        vae=image_vae(4),
        text_encoder=transformers.CLIPTextModel(clip(16)),
        text_encoder_2=t5(32),
        tokenizer=tokenizer(16, bos=True),
        tokenizer_2=tokenizer(16),
    )


def wan_transformer(**kwargs):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **kwargs,
    )


def wan(networks: int = 1):
    names = ["transformer", "transformer_2"][:networks]
    return dict(
        **{name: wan_transformer() for name in names},
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.0, 2.0, 1.5, 0.5],
        ),
        text_encoder=t5(32, "UMT5"),
        tokenizer=tokenizer(16),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline of diffusers: how it is made and called, and what it `has` among

    cfg                 two evaluations for each time, conditional and not
    embedded_guidance   the network is told the strength of guidance
    two_networks        one above a boundary in time, another below
    inverted_time       the network's time runs from 0, noise, to 1, data
    video               latents have frames
    img2img             `img2img` is the class of a pipeline that begins at an image, with `strength`
    """

    name: str
    pipeline: str
    components: Callable[[], dict]
    scheduler: tuple[str, dict]  # as the published model has it: class and configuration
    arguments: dict
    has: frozenset[str]
    img2img: str | None = None
    config: dict = dataclasses.field(default_factory=dict)

    def make(self, seed: int = 0, scheduler: str | None = None, **scheduler_config):
        """The pipeline, with its published scheduler or one of the class named; scheduler_config comes on top."""
        kind, published = self.scheduler
        config = ({} if scheduler not in (None, kind) else published) | scheduler_config
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            parts = self.components()
            for part in parts.values():
                if isinstance(part, torch.nn.Module):
                    randomise(part)
        parts["scheduler"] = getattr(diffusers, scheduler or kind)(**config)
        pipe = getattr(diffusers, self.pipeline)(**parts, **self.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, prompts: list[str] | None = None) -> dict:
        """Arguments of a call for a sample of each prompt: all but the number of steps and the type of output."""
        prompts = PROMPTS if prompts is None else prompts
        return dict(prompt=list(prompts), **self.arguments)


DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256)
UNIPC = ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
IMAGE = dict(height=16, width=16, max_sequence_length=16)
VIDEO = dict(height=16, width=16, num_frames=5, max_sequence_length=16)

_ALL = [
    Family(
        "sd3",
        "StableDiffusion3Pipeline",
        sd3,
        ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
        dict(**IMAGE, guidance_scale=5.0, negative_prompt="grey"),
        frozenset({"cfg", "img2img"}),
        "StableDiffusion3Img2ImgPipeline",
    ),
    Family(
        "flux",
        "FluxPipeline",
        flux,
        ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, max_image_seq_len=4096, **DYNAMIC)),
        dict(**IMAGE, guidance_scale=3.5),
        frozenset({"embedded_guidance", "img2img"}),
        "FluxImg2ImgPipeline",
    ),
    Family(
        "wan21",
        "WanPipeline",
        wan,
        UNIPC,
        dict(**VIDEO, guidance_scale=5.0, negative_prompt="grey"),
        frozenset({"cfg", "video", "img2img"}),
        "WanVideoToVideoPipeline",
    ),
    Family(
        "wan22",
        "WanPipeline",
        functools.partial(wan, 2),
        UNIPC,
        dict(**VIDEO, guidance_scale=4.0, guidance_scale_2=3.0, negative_prompt="grey"),
        frozenset({"cfg", "video", "two_networks"}),
        config=dict(boundary_ratio=0.875),
    ),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
