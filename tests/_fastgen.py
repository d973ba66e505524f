"""A stand-in for FastGen (NVlabs/FastGen, commit 34f30e8), of its interface alone: what examples/fastgen_trainer.py and
flowkernels/integrations/fastgen.py take of it, with the names, arguments and shapes that it has there. FastGen itself
is installed from a clone; docs/trainers.md says what ran with it."""

import itertools
import sys
import types

import torch
from torch import nn


def lazy_call(target):
    return lambda **kwargs: types.SimpleNamespace(target=target, kwargs=kwargs, config=None)


def instantiate(call):
    given = dict(call.kwargs)
    if "sampler_start_idx" in given and given["sampler_start_idx"] is None:
        given["sampler_start_idx"] = 0  # its trainer's doing
    return call.target(**given)


class DiT(nn.Module):
    """A network that predicts noise - data at times from 0, data, to 0.999; conditions are one-hot classes."""

    def __init__(self, input_size, in_channels, num_classes, class_dropout_prob, **sizes):
        super().__init__()
        d = in_channels * input_size**2
        self.inside = nn.Linear(d + 1 + num_classes, 32)
        self.outside = nn.Linear(32, d)

    def forward(self, x_t, t, condition=None, fwd_pred_type=None):
        assert bool(((t >= 0) & (t <= 0.999 + 1e-6)).all()), t
        rows = torch.cat([x_t.flatten(1), t[:, None].to(x_t), condition], 1)
        flow = self.outside(torch.tanh(self.inside(rows))).view(x_t.shape)
        if fwd_pred_type == "x0":
            return x_t - t.to(x_t).view(-1, 1, 1, 1) * flow
        assert fwd_pred_type in (None, "flow")
        return flow


class FastGenModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.device, self.precision_amp_infer = config, torch.device(config.device), None
        self.build_model()

    def build_model(self):
        self.net = instantiate(self.config.net).train().requires_grad_(True)

    def load_student_weights_and_ema(self):
        self.net.load_state_dict(torch.load(self.config.pretrained_model_path))

    @property
    def net_inference(self):
        return self.net

    @classmethod
    def generator_fn(cls, net, noise, student_sample_steps, t_list, condition, student_sample_type, precision_amp=None):
        assert len(t_list) == student_sample_steps + 1
        assert t_list[-1] == 0
        assert student_sample_type == "ode"
        with torch.inference_mode():
            x = t_list[0] * noise
            for t, after in itertools.pairwise(t_list):
                x0 = net(x, torch.full((len(x),), t), condition=condition, fwd_pred_type="x0")
                x = (1 - after) * x0 + after * (x - (1 - t) * x0) / t
        return x


class KDModel(FastGenModel):
    def build_model(self):
        super().build_model()
        self.load_student_weights_and_ema()

    def single_train_step(self, data, iteration):
        path, real, times = data["path"], data["real"], torch.tensor(self.config.sample_t_cfg.t_list)
        assert path.shape[1] == 4
        ids = torch.randint(4, (len(real),))
        x = path[torch.arange(len(real)), ids]
        x0 = self.net(x, times[ids], condition=data["condition"], fwd_pred_type="x0")
        loss = 0.5 * (x0 - real).square().mean()
        return {"total_loss": loss}, {}


class Trainer:
    def __init__(self, config):
        self.config = config

    def run(self, model):
        optimizer = torch.optim.Adam(model.net.parameters(), lr=self.config.model.net_optimizer.lr)
        loader = iter(instantiate(self.config.dataloader_train))
        for iteration in range(1, self.config.trainer.max_iter):
            losses, outputs = model.single_train_step(next(loader), iteration)
            losses["total_loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        if "gen_rand" in outputs:  # which its callbacks call for pictures
            assert outputs["gen_rand"]().shape == outputs["input_rand"].shape


def create_config():
    a = types.SimpleNamespace
    trainer = a(callbacks=dict(grad_clip=None, wandb=None), max_iter=10, resume=True, checkpointer=a(save_dir=""))
    model = a(sample_t_cfg=a(t_list=None), net_optimizer=a(lr=1e-4), student_sample_type="sde", student_sample_steps=1)
    return a(trainer=trainer, model=model, model_class=None, dataloader_train=None)


def install(monkeypatch) -> None:
    """As modules of FastGen's names."""
    for name, held in {
        "fastgen": {},
        "fastgen.configs": {},
        "fastgen.configs.methods": {},
        "fastgen.configs.methods.config_kd": dict(create_config=create_config),
        "fastgen.methods": dict(FastGenModel=FastGenModel, KDModel=KDModel),
        "fastgen.networks": {},
        "fastgen.networks.DiT": {},
        "fastgen.networks.DiT.network": dict(DiT=DiT),
        "fastgen.trainer": dict(Trainer=Trainer),
        "fastgen.utils": dict(LazyCall=lazy_call, instantiate=instantiate),
    }.items():
        module = types.ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
