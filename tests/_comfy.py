"""ComfyUI for test_comfy.py. `install` puts a stand-in for the part of its interface that SAMPLER and SIGMAS meet in
its place, written after commit a125cd8 (0.3.64): its names, arguments and shapes, without devices, memory or hooks.
With COMFYUI=FOLDER, a checkout with its requirements installed, it is ComfyUI itself that runs: one such run at a time,
in one process (pytest -p no:xdist). docs/integrations/comfy.md says what ran so.

`guider(network, ...)` makes what SamplerCustomAdvanced calls, `guider.sample(noise, latent_image, sampler, sigmas)`.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types

import torch
from torch import nn

REAL = os.environ.get("COMFYUI", "")


class CONST:
    """Of flow matching: x = sigma noise + (1 - sigma) latent, and the network predicts noise - data."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * _as_rows(sigma, model_output)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1.0 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1.0 - sigma)


class EPS:
    """Of diffusion."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * _as_rows(sigma, model_output)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * sigma + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


def _as_rows(sigma, x):
    return sigma.view(-1, *[1] * (x.dim() - 1))


class ModelSamplingDiscreteFlow(nn.Module):
    sigma_max = torch.tensor(1.0)

    def timestep(self, sigma):
        return sigma * 1000


class BaseModel(nn.Module):
    """As SD3's: times of 1000 sigma, and latents that are shifted where they are not empty."""

    def __init__(self, network, kind):
        super().__init__()
        self.diffusion_model = network
        self.model_sampling = type("ModelSampling", (ModelSamplingDiscreteFlow, kind), {})()

    def apply_model(self, x, t, **kwargs):
        out = self.diffusion_model(x.to(self.diffusion_model.dtype), self.model_sampling.timestep(t).float(), **kwargs)
        return self.model_sampling.calculate_denoised(t, out.float(), x)

    def scale_latent_inpaint(self, sigma, noise, latent_image):
        return self.model_sampling.noise_scaling(_as_rows(sigma, noise), noise, latent_image)


class KSamplerX0Inpaint:
    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is not None:
            kept = self.inner_model.inner_model.scale_latent_inpaint(
                sigma=sigma, noise=self.noise, latent_image=self.latent_image
            )
            x = x * denoise_mask + kept * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out if denoise_mask is None else out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function = sampler_function

    def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar=False):
        extra_args["denoise_mask"] = denoise_mask
        model = KSamplerX0Inpaint(wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        sampling = wrap.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent_image)
        told = None
        if callback is not None:
            told = lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)  # noqa: E731
        x = self.sampler_function(model, x, sigmas, extra_args=extra_args, callback=told, disable=disable_pbar)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


class CFGGuider:
    """With a positive and a negative condition, which the network is called with one after the other."""

    def __init__(self, network, kind=CONST, conditions=(None, None), cfg=1.0, options=None):
        self.inner_model, self.cfg = BaseModel(network, kind), cfg
        self.conditions, self.options = conditions, options or {}

    def __call__(self, x, timestep, model_options=None, seed=None):
        positive, negative = self.conditions
        out = self.inner_model.apply_model(x, timestep, context=positive)
        if self.cfg != 1:
            uncond = self.inner_model.apply_model(x, timestep, context=negative)
            out = uncond + (out - uncond) * self.cfg
        for function in self.options.get("sampler_post_cfg_function", []):
            out = function({"denoised": out, "sigma": timestep, "input": x})
        return out

    def sample(self, noise, latent, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        args = {"model_options": dict(self.options), "seed": seed}
        return sampler.sample(self, sigmas, args, callback, noise, latent, denoise_mask, disable_pbar).float()


def _sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """ComfyUI's own Euler steps."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


class _Folders(types.ModuleType):
    """folder_paths: folders of models by name, and the files in them."""

    def __init__(self, base):
        super().__init__("folder_paths")
        self.models_dir, self.folder_names_and_paths = os.path.join(base, "models"), {}

    def add_model_folder_path(self, folder_name, full_folder_path, is_default=False):
        paths = self.folder_names_and_paths.setdefault(folder_name, ([], set()))[0]
        if full_folder_path not in paths:
            paths.append(full_folder_path)

    def get_filename_list(self, folder_name):
        found = set()
        for folder in self.folder_names_and_paths[folder_name][0]:
            for path, _, names in os.walk(folder):
                found |= {os.path.relpath(os.path.join(path, name), folder) for name in names}
        return sorted(found)

    def get_full_path_or_raise(self, folder_name, filename):
        for folder in self.folder_names_and_paths[folder_name][0]:
            if os.path.isfile(path := os.path.join(folder, filename)):
                return path
        raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")


def install(monkeypatch, base):
    """base: ComfyUI's own folder, in which custom_nodes and models are."""
    if REAL:
        return _install_real(monkeypatch, base)
    modules = {
        "comfy": {},
        "comfy.model_sampling": dict(CONST=CONST, EPS=EPS, ModelSamplingDiscreteFlow=ModelSamplingDiscreteFlow),
        "comfy.samplers": dict(KSAMPLER=KSAMPLER, ksampler=lambda name: KSAMPLER({"euler": _sample_euler}[name])),
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules["comfy"], name.partition(".")[2], module, raising=False)
    monkeypatch.setitem(sys.modules, "folder_paths", _Folders(str(base)))
    return CFGGuider


def _install_real(monkeypatch, base):
    if "comfy" not in sys.modules:
        if importlib.util.find_spec("torchvision") is None:  # of which nothing runs here
            made = types.ModuleType("torchvision")
            made.__spec__, made.transforms = importlib.machinery.ModuleSpec("torchvision", None), None
            sys.modules["torchvision"] = made
        sys.path.insert(0, REAL)
        given, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args

        sys.argv = given
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.samplers
    import comfy.supported_models
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(base / "models"))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "flowkernels", raising=False)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})

    def guider(network, kind=None, conditions=(None, None), cfg=1.0, options=None):
        types_of = comfy.model_base.ModelType
        config = comfy.supported_models.SD3({"disable_unet_model_creation": True})
        config.latent_format = comfy.latent_formats.LatentFormat()
        config.latent_format.latent_channels = 2
        flow = kind is None or kind is comfy.model_sampling.CONST
        model = comfy.model_base.BaseModel(config, types_of.FLOW if flow else types_of.EPS)
        model.diffusion_model = network
        model.memory_required = lambda *args, **kwargs: 0
        made = comfy.samplers.CFGGuider(
            comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        )
        made.set_conds(*[[[c, {}]] if c is not None else [[torch.zeros(1, 1, 1), {}]] for c in conditions])
        made.set_cfg(cfg)
        made.model_options = {**made.model_options, **(options or {})}
        return made

    return guider
