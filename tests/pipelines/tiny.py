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
        fast.chat_template = (
            "{% for m in messages if m.role == 'user' %}"
            "{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
        )
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


def clip(width: int, length: int = 16):
    return transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
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


def decoder_only(kind: str, model: str = "Model", **kwargs):
    """A language model of transformers, 16 wide with 2 layers."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = getattr(transformers, f"{kind}Config")(**sizes | kwargs)
    return getattr(transformers, f"{kind}{model}")(config)


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


def flux2():
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        model_type="mistral",
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        model_type="pixtral",
    )
    return dict(
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=diffusers.AutoencoderKLFlux2(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer(16, chat=True),
    )


def qwenimage():
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6)
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters=rope,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=16)
    return dict(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.0, 2.0, 1.5, 0.5],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer(512, eos=False),
    )


def ltx():
    return dict(
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=32,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False),
            downsample_type=("conv", "conv"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=2,
        ),
        text_encoder=t5(32),
        tokenizer=tokenizer(16),
    )


def sana():
    return dict(
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
        ),
        text_encoder=decoder_only("Gemma2", query_pre_attn_scalar=8),
        tokenizer=tokenizer(16, bos=True, eos=False),
    )


def lumina2():
    return dict(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(64, 32, 32),
            cap_feat_dim=16,
        ),
        vae=image_vae(4),
        text_encoder=decoder_only("Gemma2", query_pre_attn_scalar=8),
        tokenizer=tokenizer(48, bos=True, eos=False),
    )


def zimage():
    return dict(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[128, 32, 32],
        ),
        vae=image_vae(4),
        text_encoder=decoder_only("Qwen3"),
        tokenizer=tokenizer(16, eos=False, chat=True),
    )


def cogview4():
    return dict(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        vae=image_vae(4),
        text_encoder=decoder_only("Glm"),
        tokenizer=tokenizer(16, bos=True, eos=False, side="left"),
    )


def mochi():
    return dict(
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=16,
            max_sequence_length=16,
        ),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            temporal_expansions=(1, 2, 3),
            spatial_expansions=(2, 2, 2),
            add_attention_block=(False,) * 5,
        ),
        text_encoder=t5(32),
        tokenizer=tokenizer(16),
    )


def hidream():
    return dict(
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
            force_inference_output=True,
        ),
        vae=image_vae(4),
        text_encoder=transformers.CLIPTextModelWithProjection(clip(16)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip(16)),
        text_encoder_3=t5(32),
        text_encoder_4=decoder_only("Llama", "ForCausalLM"),
        tokenizer=tokenizer(16, bos=True),
        tokenizer_2=tokenizer(16, bos=True),
        tokenizer_3=tokenizer(16),
        tokenizer_4=tokenizer(16, bos=True),
    )


def auraflow():
    return dict(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        vae=image_vae(4, shift_factor=None),
        text_encoder=t5(32, "UMT5"),
        tokenizer=tokenizer(16),
    )


def hunyuanvideo():
    return dict(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=decoder_only("Llama"),
        text_encoder_2=transformers.CLIPTextModel(clip(16, 77)),
        tokenizer=tokenizer(64, bos=True, eos=False),
        tokenizer_2=tokenizer(77, bos=True),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline of diffusers: how it is made and called, and what it `has` among

    cfg                 two evaluations for each time, conditional and not
    embedded_guidance   the network is told the strength of guidance
    two_networks        one above a boundary in time, another below
    inverted_time       the network's time runs from 0, noise, to 1, data
    inverted_sigmas     so does the scheduler's (`invert_sigmas`)
    unshifted_time      the network is told sigma as it was before the scheduler's shift
    video               latents have frames
    img2img             `img2img` is the class of a pipeline that begins at an image, with `strength`
    """

    name: str
    pipeline: str
    components: Callable[[], dict]
    scheduler: tuple[str, dict]  # as the published model has it: class and configuration
    arguments: dict
    has: frozenset[str]
    scale: float = 1000.0  # what the network's time is at sigma = 1, or with inverted_time at sigma = 0
    img2img: str | None = None
    config: dict = dataclasses.field(default_factory=dict)
    attributes: dict = dataclasses.field(default_factory=dict)  # of the pipeline, which does not save them

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
        return self.prepare(getattr(diffusers, self.pipeline)(**parts, **self.config))

    def prepare(self, pipe):
        """What saving leaves out, for a pipeline that was loaded."""
        pipe.set_progress_bar_config(disable=True)
        for name, value in self.attributes.items():
            setattr(pipe, name, value)
        if hasattr(pipe, "text_encoder_4"):  # HiDream asks it for attentions
            pipe.text_encoder_4.set_attn_implementation("eager")
        return pipe

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """What sigma the network is told when it is called at its time t; see `unshifted_time`."""
        t = t.double() / self.scale
        return 1 - t if "inverted_time" in self.has else t

    def networks(self, pipe) -> list[torch.nn.Module]:
        return [pipe.transformer] + ([pipe.transformer_2] if "two_networks" in self.has else [])

    def call(self, prompts: list[str] | None = None) -> dict:
        """Arguments of a call for a sample of each prompt: all but the number of steps and the type of output."""
        prompts = PROMPTS if prompts is None else prompts
        return dict(prompt=list(prompts), **self.arguments)


EULER = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
UNIPC = ("UniPCMultistepScheduler", FLOW)
IMAGE = dict(height=16, width=16, max_sequence_length=16)
VIDEO = dict(IMAGE, num_frames=5)
CFG = dict(guidance_scale=4.0, negative_prompt="grey")

_ALL = [
    Family(
        "sd3",
        "StableDiffusion3Pipeline",
        sd3,
        (EULER, dict(shift=3.0)),
        dict(**IMAGE, **CFG),
        frozenset({"cfg", "img2img"}),
        img2img="StableDiffusion3Img2ImgPipeline",
    ),
    Family(
        "flux",
        "FluxPipeline",
        flux,
        (EULER, dict(shift=3.0, **DYNAMIC)),
        dict(**IMAGE, guidance_scale=3.5),
        frozenset({"embedded_guidance", "img2img"}),
        scale=1.0,
        img2img="FluxImg2ImgPipeline",
    ),
    Family(
        "flux2",
        "Flux2Pipeline",
        flux2,
        (EULER, dict(shift=3.0, **DYNAMIC)),
        dict(**IMAGE, guidance_scale=4.0, text_encoder_out_layers=(0, 1, 2)),
        frozenset({"embedded_guidance"}),
        scale=1.0,
    ),
    Family(
        "qwenimage",
        "QwenImagePipeline",
        qwenimage,
        (EULER, dict(DYNAMIC, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)),
        dict(height=16, width=16, max_sequence_length=256, true_cfg_scale=4.0, negative_prompt=" "),
        frozenset({"cfg", "img2img"}),
        scale=1.0,
        img2img="QwenImageImg2ImgPipeline",
    ),
    Family(
        "wan21",
        "WanPipeline",
        wan,
        UNIPC,
        dict(**VIDEO, **CFG),
        frozenset({"cfg", "video", "img2img"}),
        img2img="WanVideoToVideoPipeline",
    ),
    Family(
        "wan22",
        "WanPipeline",
        functools.partial(wan, 2),
        UNIPC,
        dict(**VIDEO, **CFG, guidance_scale_2=3.0),
        frozenset({"cfg", "video", "two_networks"}),
        config=dict(boundary_ratio=0.875),
    ),
    Family(
        "wan22-5b",
        "WanPipeline",
        wan,
        UNIPC,
        dict(**VIDEO, **CFG),
        frozenset({"cfg", "video"}),
        config=dict(expand_timesteps=True),  # its network is told the time of every token
    ),
    Family(
        "ltx",
        "LTXPipeline",
        ltx,
        (EULER, dict(DYNAMIC, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1)),
        dict(VIDEO, **CFG, height=32, width=32),
        frozenset({"cfg", "video"}),
    ),
    Family(
        "sana",
        "SanaPipeline",
        sana,
        ("DPMSolverMultistepScheduler", FLOW),
        dict(IMAGE, **CFG, height=32, width=32, use_resolution_binning=False, complex_human_instruction=None),
        frozenset({"cfg"}),
    ),
    Family(
        "lumina2",
        "Lumina2Pipeline",
        lumina2,
        (EULER, dict(shift=6.0)),
        dict(**CFG, height=64, width=64, max_sequence_length=48, system_prompt="draw"),
        frozenset({"cfg", "inverted_time"}),
        scale=1.0,
    ),
    Family(
        "zimage",
        "ZImagePipeline",
        zimage,
        (EULER, dict(shift=3.0)),
        dict(**IMAGE, guidance_scale=4.0),
        frozenset({"cfg", "inverted_time", "img2img"}),
        scale=1.0,
        img2img="ZImageImg2ImgPipeline",
    ),
    Family(
        "cogview4",
        "CogView4Pipeline",
        cogview4,
        (EULER, dict(DYNAMIC, base_shift=0.25, max_shift=0.75, time_shift_type="linear")),
        dict(**IMAGE, **CFG),
        frozenset({"cfg", "unshifted_time"}),
    ),
    Family(
        "mochi",
        "MochiPipeline",
        mochi,
        (EULER, dict(invert_sigmas=True)),
        dict(**VIDEO, **CFG),
        frozenset({"cfg", "video", "inverted_time", "inverted_sigmas"}),
    ),
    Family(
        "hidream",
        "HiDreamImagePipeline",
        hidream,
        UNIPC,
        dict(**IMAGE, **CFG),
        frozenset({"cfg"}),
        attributes=dict(default_sample_size=8),  # it makes every image as large as that many latents' square
    ),
    Family(
        "auraflow",
        "AuraFlowPipeline",
        auraflow,
        (EULER, dict(shift=1.73)),
        dict(**IMAGE, **CFG),
        frozenset({"cfg"}),
        scale=1.0,
    ),
    Family(
        "hunyuanvideo",
        "HunyuanVideoPipeline",
        hunyuanvideo,
        (EULER, dict(shift=7.0)),
        dict(**VIDEO, guidance_scale=6.0, prompt_template=dict(template="draw {}", crop_start=5)),
        frozenset({"embedded_guidance", "video"}),
    ),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL if hasattr(diffusers, family.pipeline)}
