"""Reads a prompt once and continues it several times; the continuations share its pages.

python examples/fork_prompt.py
"""

import torch

import hamblocks as hb

torch.manual_seed(0)
selector = hb.Threshold(hb.FixedThreshold(0.9)) | hb.Window(32)
model = hb.Decoder(256, 2, lambda _: hb.HAMLayer(64, 4, selector=selector)).eval()
prompt = torch.randint(256, (1, 2000))


def pages(states: list[hb.HAMState]) -> int:
    """Bytes of the stored tokens of all layers."""
    return sum(state.cache.nbytes for state in states if state.cache is not None)


with torch.no_grad():
    logits, states, _ = model(prompt, state=model.init_state(1))
    print(f"the prompt: {pages(states):,} bytes of pages")
    likely = logits[0, -1].topk(3).indices
    for first in likely.tolist():
        branch = [state.fork() for state in states]  # copies no page
        token, said = torch.tensor([[first]]), [first]
        for _ in range(8):
            logits, branch, _ = model(token, state=branch)
            token = logits[:, -1].argmax(-1, keepdim=True)
            said.append(int(token))
        print(f"after {first}: {said[1:]}; {pages(branch):,} bytes, the prompt's among them")
