"""F5-TTS: its `CFM.sample` by a schedule or solver, whose times take the place of `steps`, EPSS and sway sampling.

model is a CFM; given are the arguments of its `sample`. That solves its velocity `fn(t, x)`, guidance included, by what
its module has as `odeint`.
"""

import flowkernels as fk


def run(model, solver, given):
    from f5_tts.model import cfm

    odeint = cfm.odeint
    # with flowkernels
    cfm.odeint = lambda fn, noise, t, **method: fk.sample(lambda x, t: fn(t[0], x), noise, solver)[None]
    # ----
    try:
        return model.sample(**given)[0]
    finally:
        cfm.odeint = odeint
