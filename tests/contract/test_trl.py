"""The adapter for TRL: its losses are TRL's where both mean the same, and its trainer trains. Runs where trl is."""

import importlib
import os
import re

import pytest
import torch
from helpers import ROOT, refused

from mdistiller.registry import temperature_rules

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl.experimental.gkd", reason="pip install 'mdistiller[trl]'")
datasets, peft, tokenizers, transformers, gkd, stable, adapter = map(
    importlib.import_module,
    ("datasets", "peft", "tokenizers", "transformers", "trl.experimental.gkd", "trl.trainer.distillation_trainer")
    + ("mdistiller.integrations.trl",),
)

SYMBOLS = ["<pad>", "<eos>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz "]
VOCABULARY = len(SYMBOLS)
# GKDTrainer's beta of each divergence that is TRL's too
BETAS = {name: beta for name, beta in (("forward", 0.0), ("jsd", 0.5), ("reverse", 1.0)) if name in adapter.DIVERGENCES}
SHIFT_BLIND = ["fixed", "centred", "std", "norm"]


def a_tokenizer():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({symbol: place for place, symbol in enumerate(SYMBOLS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": SYMBOLS[2:4]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def a_gpt(width, seed, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=2, n_head=2, **special
    )
    gpt = transformers.GPT2LMHeadModel(config)
    gpt.lm_head.weight.data *= 20  # logits of a trained model's size
    return gpt


def a_dialogue(length):
    return [
        {"role": "user", "content": "abcdef"[:length]},
        {"role": "assistant", "content": "hello there"[: 2 * length]},
    ]


@pytest.fixture
def build(tmp_path):
    """`build(cls, student=None, teacher=None, lmbda=0.0, beta=0.0, bf16=False, **kwargs)`: a trainer of two steps."""

    def build(
        cls=adapter.RuleDistillationTrainer, student=None, teacher=None, lmbda=0.0, beta=0.0, bf16=False, **kwargs
    ):
        steps = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01}
        quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": []}
        own = {"max_new_tokens": 4, "lmbda": lmbda, "beta": beta, "bf16": bf16, "activation_checkpointing": False}
        args = gkd.GKDConfig(str(tmp_path), **own, **steps, **quiet)
        data = datasets.Dataset.from_list([{"messages": a_dialogue(length)} for length in (1, 5, 2, 3)])
        parts = {"train_dataset": data, "eval_dataset": data, "processing_class": a_tokenizer()}
        return cls(student or a_gpt(16, 0), teacher or a_gpt(32, 1), args, **parts, **kwargs)

    return build


def loss_and_gradients(trainer, batch, **kwargs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, **kwargs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def agree(first, second, tolerance):
    for ours, theirs in zip(first, second, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def rows(count=48, vocabulary=512):
    generator = torch.Generator().manual_seed(3)
    return (3 * torch.randn(2, count, vocabulary, generator=generator)).unbind(0)


def ours(trainer, student, teacher):
    student = student.clone().requires_grad_()
    loss = trainer._softened(student, teacher)[0] / len(student)
    return loss.detach(), *torch.autograd.grad(loss, student)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("divergence", BETAS)
def test_fixed_is_trl_s_divergence_times_tau_squared(build, divergence, tau):
    student, teacher = rows()
    leaf = student.clone().requires_grad_()
    given = {"beta": BETAS[divergence], "temperature": tau}
    loss = gkd.GKDTrainer.generalized_jsd_loss(leaf[None], teacher[None], torch.zeros(1, len(leaf)), **given)
    theirs = loss.detach() * tau**2, torch.autograd.grad(loss, leaf)[0] * tau**2
    agree(ours(build(rule="fixed", divergence=divergence, tau=tau), student, teacher), theirs, 1e-6)


@pytest.mark.parametrize("divergence", BETAS)
def test_fixed_is_the_divergence_of_trl_s_stable_trainer(build, divergence):
    generator = torch.Generator().manual_seed(4)
    hidden_s, hidden_t = torch.randn(2, 40, 24, generator=generator)
    # logits of deviation 2.5: on sharper ones TRL's gradient of JSD is 1e-5 away from that in float64
    head_s, head_t = torch.randn(2, 512, 24, generator=generator) / 2
    hidden_s.requires_grad_()
    loss = stable.ChunkedDivergenceFunction.apply(hidden_s, head_s, None, hidden_t, head_t, None, BETAS[divergence])[
        0
    ].mean()
    theirs = loss.detach(), torch.autograd.grad(loss, hidden_s)[0]
    value, gradient = ours(
        build(rule="fixed", divergence=divergence), hidden_s.detach() @ head_s.T, hidden_t @ head_t.T
    )
    agree((value, gradient @ head_s), theirs, 1e-5)


@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("divergence", BETAS)
def test_a_batch_s_loss_counts_and_averages_the_tokens_that_trl_s_does(build, divergence, items):
    given = {"num_items_in_batch": torch.tensor(items)} if items else {}
    trainer = build(rule="fixed", divergence=divergence, chunk=3)
    other = build(gkd.GKDTrainer, beta=BETAS[divergence])
    batch = next(iter(other.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    agree(loss_and_gradients(trainer, batch, **given), loss_and_gradients(other, batch, **given), 2e-6)


@pytest.mark.parametrize("rule", sorted(name for name in temperature_rules.own if name != "learned"))
def test_chunks_change_nothing(build, rule):
    teacher, losses = a_gpt(32, 1), []
    for chunk in (1, 4, 1000):
        trainer = build(teacher=teacher, rule=rule, chunk=chunk)
        losses.append(loss_and_gradients(trainer, next(iter(trainer.get_eval_dataloader()))))
    agree(losses[0], losses[2], 1e-5)
    agree(losses[1], losses[2], 1e-5)


def test_a_batch_without_a_token_that_counts_is_a_finite_zero(build):
    trainer = build()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"][:] = -100
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss == 0 and not gradients.any()


class Shifted(torch.nn.Module):
    """A teacher whose rows of logits bear a constant each, which softmax does not see."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.config = gpt, gpt.config

    def forward(self, input_ids, **kwargs):
        outputs = self.gpt(input_ids, **kwargs)
        outputs.logits = outputs.logits - 3.0 - input_ids[..., None]
        return outputs


@pytest.mark.parametrize("rule", [*SHIFT_BLIND, "max_logit"])
def test_a_constant_on_the_teacher_s_rows_is_seen_by_max_logit_alone(build, rule):
    trainer = build(rule=rule)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = loss_and_gradients(trainer, batch)
    trainer.teacher_model = Shifted(trainer.teacher_model)
    shifted = loss_and_gradients(trainer, batch)
    if rule in SHIFT_BLIND:
        agree(shifted, plain, 1e-5)
    else:
        assert (shifted[0] - plain[0]).abs() > 1e-3 * plain[0]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_two_steps_train_the_student_alone_and_log_the_temperatures(build, lmbda, lora):
    student = {"peft_config": peft.LoraConfig(r=2, target_modules=["c_attn"])} if lora else {}
    trainer = build(lmbda=lmbda, bf16=lora, **student)
    before, teacher = (
        {name: p.clone() for name, p in model.named_parameters()} for model in (trainer.model, trainer.teacher_model)
    )
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved and moved <= trainable and (not lora or all("lora" in name for name in moved))
    assert all(p.grad is None and torch.equal(p, teacher[name]) for name, p in trainer.teacher_model.named_parameters())
    for row in trainer.state.log_history[:2]:
        assert row["temperature_student"] + row["temperature_teacher"] == pytest.approx(2)
        assert row["fell_back"] == 0 and row["temperature_teacher"] != 1 and row["loss"] > 0
    figures = trainer.evaluate()
    assert figures["eval_loss"] > 0
    assert {"eval_temperature_student", "eval_fell_back"} <= trainer.state.log_history[-1].keys()
    assert "temperature_student" not in trainer.state.log_history[-1]


def test_accumulated_batches_are_one_batch(build):
    """Of uneven halves too: their losses are sums over the tokens of both."""
    trainer = build()
    batch = next(iter(trainer.get_eval_dataloader()))
    count = (batch["labels"][:, 1:] != -100).sum()
    halves = [{key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels")} for rows in ([0, 1], [2, 3])]
    parts = [loss_and_gradients(trainer, half, num_items_in_batch=count) for half in halves]
    whole = loss_and_gradients(trainer, batch)
    agree([sum(values) for values in zip(*parts, strict=True)], whole, 1e-5)


def test_columns_that_stand_for_no_token_are_left_out(build):
    """A vocabulary padded to a round number, as many are, changes no temperature and no loss."""
    losses = []
    for vocabulary in (40, VOCABULARY):
        trainer = build(student=a_gpt(16, 0, 40), teacher=a_gpt(32, 1, 40))
        for model in (trainer.model, trainer.teacher_model):
            model.resize_token_embeddings(vocabulary)
        loss, gradients = loss_and_gradients(trainer, next(iter(trainer.get_eval_dataloader())))
        losses.append((loss, gradients.norm()))
    agree(losses[0], losses[1], 1e-6)


def test_mistakes_are_named(build):
    with refused("unknown temperature rule 'centered'; did you mean centred?"):
        build(rule="centered")
    with refused("unknown divergence 'forwards'; did you mean forward?"):
        build(divergence="forwards")
    with refused("rule=learned: learns parameters"):
        build(rule="learned")
    with refused("the temperature rule erratum: .*'marign'"):
        build(rule="erratum", options={"marign": 0.1})
    with refused("tau=0, chunk=256: tau must be positive"):
        build(tau=0)


def test_the_page_s_snippet_trains(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(from trl.*?)```", (ROOT / "docs" / "language.md").read_text(), re.S)
    assert "RuleDistillationTrainer" in snippet
    monkeypatch.chdir(tmp_path)
    dialogues = datasets.Dataset.from_list([{"messages": a_dialogue(length)} for length in (1, 5)])
    names = {"student": a_gpt(16, 0), "teacher": a_gpt(32, 1), "tokenizer": a_tokenizer(), "dialogues": dialogues}
    exec(snippet, names)
    assert names["trainer"].state.global_step == 2
