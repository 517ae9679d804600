"""A tokenizer with one token for each character, and a tiny model of transformers for it."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in (10, *range(32, 127))]


def character_tokenizer():
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=" ")


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(CHARACTERS), **sizes, **heads)).eval()
