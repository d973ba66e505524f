"""A policy of lerobot (pi0, SmolVLA): calibrated on what it sees, and then 4 steps where its own loop makes 10.

model is `policy.model` of a PI0Policy or SmolVLAPolicy; observations are what its `sample_actions` takes: images, their
masks, tokens, their masks, and the robot's state, a row for each of several moments of an episode.
"""

import flowkernels as fk
from flowkernels.integrations.host_loops import host_loop, host_velocity


def run(model, observations, noise):
    # with flowkernels
    v = host_velocity(model, "denoise_step", lambda: model.sample_actions(*observations))
    cal = fk.calibrate(v, v.noise, grid=20, steps=[4], effort="fit")
    with host_loop(model, "denoise_step", cal.best(4)):
        # ----
        model.config.num_steps = model.config.num_inference_steps = 4  # SmolVLA's name, and pi0's
        return model.sample_actions(*observations, noise=noise), cal
