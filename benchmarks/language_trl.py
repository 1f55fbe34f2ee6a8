"""Distillation of one language model beside TRL on one machine: tokens a second, and memory of the last layer and loss.

python3 benchmarks/language_trl.py speed [--rounds 3] [--steps 40] [--threads 2]
python3 benchmarks/language_trl.py memory [--tokens 4096] [--classes 32768]

Runs where trl is installed (`pip install -e ".[trl]"`). Speed: a GPT-2 of transformers and a teacher about five times
as large, with new weights; a step has 8 blocks of about 256 tokens, a vocabulary of 2,048, float32, AdamW, forward KL
at temperature 1. TRL's GKDTrainer (lmbda 0, beta 0), this package's trainer for TRL, and its own loop on the same two
networks by hf:PATH, without a bank of the teacher's logits and with a warm one. Each arm in a process of its own, the
arms take turns; of an arm the median of the rounds. Memory: what the peak of one loss with its gradient adds to that of
its inputs, hidden states (N, 128) and (N, 256) of student and teacher; each in a process of its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

BLOCK, BATCH, VOCABULARY = 256, 8, 2048
MEGABYTES = 0.4
WARM_UP = 5  # steps that are not timed
ARMS = ("GKDTrainer", "RuleDistillationTrainer", "own loop", "own loop, warm bank")
LOSSES = ("plain", "TRL, chunks", "RuleDistillationTrainer", "own loop, chunk 1024", "own loop, chunk 256")


def prepare(folder: Path) -> None:
    """Write a tokenizer and both networks into `folder`."""
    import tokenizers
    import torch
    import transformers

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(errors="replace") for file in files)[: int(1e6 * MEGABYTES)]
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([text], trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "text").write_text(text)
    for name, layers, width in (("student", 4, 128), ("teacher", 6, 256)):
        torch.manual_seed(layers)
        size = {"vocab_size": VOCABULARY, "n_positions": BLOCK, "n_layer": layers, "n_embd": width, "n_head": 4}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**size, **drop, bos_token_id=1, eos_token_id=1, pad_token_id=0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def by_trl(folder: Path, name: str, steps: int) -> float:
    """Return the tokens a second of TRL's trainer, or of ours in it."""
    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from mdistiller.integrations.trl import RuleDistillationTrainer

    class Clock(transformers.TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    ids = tokenizer((folder / "text").read_text())["input_ids"]
    size = BLOCK - 6  # a prompt, and what another encoding of a piece may add
    starts = range(0, min(len(ids) - size, BATCH * (steps + WARM_UP) * size), size)
    pieces = [tokenizer.decode(ids[start : start + size]) for start in starts]
    rows = [{"messages": [{"role": "user", "content": "\n"}, {"role": "assistant", "content": p}]} for p in pieces]
    own = {"lmbda": 0.0, "beta": 0.0, "bf16": False, "activation_checkpointing": False, "max_length": BLOCK}
    own |= {"gradient_checkpointing": False, "max_steps": steps + WARM_UP, "per_device_train_batch_size": BATCH}
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": [], "logging_steps": 10**6}
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder / side) for side in ("student", "teacher")]
    clock, more = Clock(), {}
    cls = GKDTrainer
    if name == "RuleDistillationTrainer":
        cls, more = RuleDistillationTrainer, {"rule": "fixed"}
    trainer = cls(
        *models,
        GKDConfig(str(folder / "trl"), **own, **quiet),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
        **more,
    )
    tokens = sum(len(tokenizer(piece)["input_ids"]) for piece in pieces) / len(pieces)
    trainer.train()
    return BATCH * tokens * steps / (clock.times[-1] - clock.times[WARM_UP - 1])


def by_own_loop(folder: Path, name: str) -> float:
    """Return the tokens a second of the own loop's second epoch."""
    warm = name.endswith("bank")
    sides = [word for side in ("teacher", "student") for word in (f"DISTILLER.{side.upper()}", f"hf:{folder / side}")]
    pairs = ["DATASET.TYPE", "text", "DATASET.ROOT", str(folder / "text"), "DATASET.TEXT.BLOCK", str(BLOCK)]
    pairs += ["DATASET.TEXT.TOKENIZER", str(folder / "student"), "DISTILLER.TYPE", "KD", *sides]
    pairs += ["DISTILLER.TEACHER_CKPT", "pretrained", "KD.TEMPERATURE", "1", "KD.LOSS.CE_WEIGHT", "0"]
    pairs += ["KD.LOSS.KD_WEIGHT", "1", "SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.00005", "SOLVER.BATCH_SIZE", str(BATCH)]
    pairs += ["SOLVER.EPOCHS", "2", "SOLVER.SCHEDULE", "cosine", "LOG.PREFIX", str(folder / "own")]
    pairs += ["EXPERIMENT.NAME", name.replace(",", ""), "TEACHER_BANK", "lazy" if warm else "off"]
    pairs += ["TEACHER_BANK_TOP_K", "64" if warm else "0"]
    tool = Path(__file__).resolve().parents[1] / "tools" / "train_ours.py"
    subprocess.run([sys.executable, str(tool), *pairs], check=True, stdout=subprocess.DEVNULL)
    (metrics,) = folder.glob(f"own/**/{name.replace(',', '')}*/metrics.jsonl")
    row = json.loads(metrics.read_text().splitlines()[-1])
    metrics.rename(metrics.with_suffix(".done"))
    return row["tokens_per_second"]


def added_by_loss(name: str, tokens: int, classes: int) -> float:
    """Return the MiB that one loss with its gradients adds to the process's peak."""
    import torch
    from torch import nn

    import mdistiller.losses as L
    from mdistiller.distillers._chunks import chunked

    torch.manual_seed(0)
    hidden, of_teacher = torch.randn(tokens, 128).requires_grad_(), torch.randn(tokens, 256)
    head, teacher = (nn.Linear(width, classes, bias=False) for width in (128, 256))
    teacher.requires_grad_(False)
    of_head = torch.zeros_like(head.weight)  # where the gradient goes, which every loss needs

    def loss(logits: torch.Tensor, rows: slice) -> dict:
        u = teacher(of_teacher[rows])
        return {"kd": L.softened_kl(logits, u, L.fixed(logits, u, 1.0))}

    def run(count: slice) -> torch.Tensor:
        part = hidden[count]
        if name == "plain":
            v, u = head(part), teacher(of_teacher[count])
            p, q = u.log_softmax(1), v.log_softmax(1)
            return nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        if name == "TRL, chunks":
            from trl.trainer.distillation_trainer import ChunkedDivergenceFunction

            of = of_teacher[count]
            return ChunkedDivergenceFunction.apply(part, head.weight, None, of, teacher.weight, None, 0.0)[0].mean()
        if name == "RuleDistillationTrainer":
            from mdistiller.integrations.trl import _ChunkedSum

            def of_rows(v, u):
                return L.softened_kl(v, u, L.fixed(v, u, 1.0)) * len(v), torch.zeros(4)

            v, u = head(part), teacher(of_teacher[count])
            return _ChunkedSum.apply(v, u, torch.arange(len(v)), of_rows, 256)[0] / len(v)
        return chunked(loss, head, part, int(name.split()[-1]))[1]["kd"]

    run(slice(0, 8)).backward()  # what a first call loads
    hidden.grad = head.weight.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    of_head += 0
    value = run(slice(None))
    value.backward()
    print(f"{name}: {float(value.detach()):.6f}", file=sys.stderr)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def child(*words: str) -> float:
    """Return the number that this script prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "one"))
    for name, default in (("rounds", 3), ("steps", 40), ("threads", 2), ("tokens", 4096), ("classes", 32768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(a.threads), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    if a.what == "one":
        if a.name in LOSSES and not a.folder:
            print(added_by_loss(a.name, a.tokens, a.classes))
        elif a.name.startswith("own"):
            print(by_own_loop(a.folder, a.name))
        else:
            print(by_trl(a.folder, a.name, a.steps))
        return
    import torch

    where = f"{a.threads} threads of {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    if a.what == "memory":
        size = ["--tokens", str(a.tokens), "--classes", str(a.classes)]
        found = {name: child("one", "--name", name, *size) for name in LOSSES}
        print(f"{a.tokens} tokens, {a.classes} classes, {where}\n")
        print("| loss and gradient | MiB | of plain |\n|---|---:|---:|")
        for name, value in found.items():
            print(f"| {name} | {value:,.0f} | {100 * value / found['plain']:.1f} % |")
        return
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        rates: dict[str, list[float]] = {name: [] for name in ARMS}
        for _ in range(a.rounds):
            for name in ARMS:
                rates[name].append(child("one", "--name", name, "--folder", place, "--steps", str(a.steps)))
    print(f"{BATCH} x {BLOCK} tokens a step, {where}; median of {a.rounds} rounds (least, most)\n")
    print("| trainer | tokens/s | beside GKDTrainer |\n|---|---:|---:|")
    for name, values in rates.items():
        ratios = [own / theirs for own, theirs in zip(values, rates["GKDTrainer"], strict=True)]
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"| {name} | {statistics.median(values):,.0f} ({spread}) | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
