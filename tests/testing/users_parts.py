"""A module of a user, as text: a gate that is right and one that looks a token ahead."""

GATES = """
import hamblocks as hb

class Written:
    def __call__(self, x, trace):
        return hb.GateOutput(trace.beta * trace.residual.float().norm(dim=-1))

class Peeks:
    def __call__(self, x, trace):
        return hb.GateOutput(x.roll(-1, 1).mean(-1, keepdim=True))
"""
