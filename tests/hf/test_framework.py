"""The tables by which transformers treats classes of models, each as a user meets it."""

import json
import subprocess
import sys

import pytest
import torch
from hf_cases import MIXED, VOCAB, config, model, text
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.distributed import DistributedConfig

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM


class Renamed(HAMForCausalLM):
    """A subclass whose name does not say what it does."""


class OwnConfig(HAMConfig):
    model_type = "ham_of_ones_own"


class OwnModel(HAMForCausalLM):
    config: OwnConfig


def trainer(made, tmp_path, **arguments):
    return Trainer(made, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **arguments))


def sharded(made):
    """As FSDP2 does it: the class of a module becomes a subclass made on the spot."""
    made.__class__ = type(f"FSDP{type(made).__name__}", (type(made),), {})
    return made


def adapted(made):
    import peft

    # adapters begin at 0
    return peft.get_peft_model(
        made, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: HAMForCausalLM(config(selector=hb.Window(4))),
        lambda: Renamed(config(selector=hb.Window(4))),
        lambda: sharded(HAMForCausalLM(config(selector=hb.Window(4)))),
        lambda: adapted(HAMForCausalLM(config(selector=hb.Window(4)))),
    ],
    ids=["own", "subclass", "sharded", "adapted"],
)
def test_label_smoothing_is_of_the_next_token(tmp_path, make):
    torch.manual_seed(0)
    made, ids = make().eval(), text(0, 4, 16)
    labels = ids.clone()
    labels[0, 5:9] = -100
    by = trainer(made, tmp_path, label_smoothing_factor=0.1)
    with torch.no_grad():
        got = by.compute_loss(made, {"input_ids": ids, "labels": labels.clone()})
        log = made(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    total, count = 0.0, 0
    for row in range(4):
        for place, label in enumerate(labels[row, 1:].tolist()):
            if label != -100:
                total -= 0.9 * log[row, place, label] + 0.1 * log[row, place].mean()
                count += 1
    assert got.item() == pytest.approx(float(total / count), abs=1e-5)


def test_evaluation_with_label_smoothing(tmp_path):
    made = model(dtype=torch.float32, selector=hb.Window(4))
    data = [{"input_ids": row, "labels": row} for row in text(5, 4, 16)]
    by = trainer(made, tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=3)
    result = by.predict(data)
    assert by.label_names == ["labels"]
    # neither the cache nor the stats
    assert result.predictions.shape == (4, 16, VOCAB)
    assert result.label_ids.shape == (4, 16)
    with torch.no_grad():
        ids = text(5, 4, 16)
        log = made(ids).logits.double().log_softmax(-1)[:, :-1]
    plain = -log.gather(-1, ids[:, 1:, None])[..., 0]
    per_row = (0.9 * plain - 0.1 * log.mean(-1)).mean(1)
    assert result.metrics["test_loss"] == pytest.approx(float(per_row.mean()), abs=1e-4)


@pytest.mark.parametrize("cls", [HAMForCausalLM, Renamed])
def test_the_loss_is_that_of_causal_models(tmp_path, cls):
    made = cls(config(selector=hb.Window(4)))
    assert made.loss_type == "ForCausalLM"
    by = trainer(made, tmp_path)
    # 15 of 16 labels have a token before them
    assert by._get_num_items_in_batch([{"labels": text(0, 2, 16)}], "cpu") == 2 * 15


LOADED = """
import sys
{imports}
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hamblocks.models",
        "from hamblocks.models import Decoder",
    ],
)
def test_a_new_process_loads_a_model_without_naming_its_class(tmp_path, imports):
    model(dtype=torch.float32).save_pretrained(tmp_path)
    code = LOADED.format(imports=imports, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "HAMForCausalLM\n"


def test_auto_classes_make_and_load_every_class(tmp_path):
    made = model(dtype=torch.float32)
    made.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is HAMConfig
    assert type(AutoConfig.for_model("ham", vocab_size=5)) is HAMConfig
    assert type(AutoModelForCausalLM.from_config(found)) is HAMForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "HAMModel"


def test_a_model_type_of_a_users_own(tmp_path):
    AutoConfig.register("ham_of_ones_own", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    OwnModel(OwnConfig(**{**config().to_dict(), "model_type": "ham_of_ones_own"})).save_pretrained(
        tmp_path
    )
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is OwnModel


def test_a_tied_weight_is_saved_once(tmp_path):
    made = model(dtype=torch.float32, tie_word_embeddings=True)
    assert made.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    made.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = HAMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize(
    "name",
    ["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager", "x/y"],
)
def test_the_policy_of_attention_names_the_implementation(tmp_path, name):
    made = model(dtype=torch.float32)
    made.save_pretrained(tmp_path)
    message = (
        r'^attn_implementation: expected "eager" or None \(the policy of attention names the '
        rf"implementation: .*\), got '{name.replace('|', '.')}'"
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        made.set_attn_implementation(name)
    with pytest.raises(ValueError, match=message):
        HAMForCausalLM(config(attn_implementation=name))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = text(0, 1, 9)
    assert torch.equal(eager(ids).logits, made(ids).logits)


RULE = {"model.stack.blocks.*.block.layer.q_proj": "colwise"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_plan": RULE}, "tp_plan: expected no rule for parts of layers"),
        (
            {"distributed_config": DistributedConfig(tp_size=2, tp_plan=RULE)},
            "distributed_config: expected no rule for parts of layers",
        ),
        (
            {"distributed_config": DistributedConfig(pp_size=2)},
            "distributed_config: expected no parallelism within layers",
        ),
        (
            {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=2)},
            "distributed_config: expected tp_size alone",
        ),
    ],
)
def test_parallelism_without_a_plan_is_refused(tmp_path, arguments, message):
    made = model(dtype=torch.float32)
    made.save_pretrained(tmp_path)
    assert made.supports_tp_plan
    assert not made.supports_pp_plan
    for cls in (HAMForCausalLM, AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=rf"^{message}"):
            cls.from_pretrained(tmp_path, **arguments)
    one = HAMForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig())
    assert torch.equal(one.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("layer_types", [MIXED, ["full_attention"] * 3])
def test_context_parallelism_and_continuous_batching_are_refused(layer_types):
    made = model(dtype=torch.float32, layer_types=layer_types)
    assert not made.supports_context_parallel
    settings = GenerationConfig(max_new_tokens=2)
    refused = r"^HAMForCausalLM: expected generate\(\) with padded prompts, got continuous batching"
    with pytest.raises(ValueError, match=refused):
        made.generate_batch([[1, 2, 3]], generation_config=settings, progress_bar=False)
    with pytest.raises(ValueError, match=refused):
        made.generate(text(0, 1, 5), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match=refused), made.continuous_batching_context_manager():
        pass


def tokenizer():
    words = {"<pad>": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>")


def test_a_pipeline_of_several_prompts(tmp_path, caplog):
    made = model(dtype=torch.float32, selector=hb.TopK(3))
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(pipe.model) is HAMForCausalLM
    prompts = ["w3 w5", "w1 w2 w3 w4 w5"]
    how = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    alone = [pipe(prompt, **how)[0]["generated_text"] for prompt in prompts]
    together = pipe(prompts, batch_size=2, **how)
    assert [answer[0]["generated_text"] for answer in together] == alone
    ids = torch.tensor([[3, 5]])
    out = made.generate(ids, max_new_tokens=4, do_sample=False)[0, 2:]
    assert alone[0].split() == pipe.tokenizer.decode(out, skip_special_tokens=True).split()
    assert "is not supported for text-generation" not in caplog.text


def test_the_generation_config_is_saved_with_the_model(tmp_path):
    made = model(dtype=torch.float32, selector=hb.TopK(3))
    made.generation_config.max_new_tokens = 3
    made.generation_config.eos_token_id = 7
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == 7
    assert loaded.generate(text(0, 1, 5), do_sample=False).shape[1] <= 8
    # a generation config that names a cache of transformers
    loaded.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match=r"^cache_implementation: expected None, got 'static'"):
        loaded.generate(text(0, 1, 5))
