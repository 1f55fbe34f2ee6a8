"""Do temperatures of each token's own help a small language model? An experiment with its decision written down first.

python3 benchmarks/text_rules.py teacher
python3 benchmarks/text_rules.py tune      # seed 0, on the validation part: tau of each rule
python3 benchmarks/text_rules.py claim     # seeds 0 to 2, on the test part
python3 benchmarks/text_rules.py record    # the last epoch of every run into results/text_rules.jsonl
python3 benchmarks/text_rules.py table     # what the runs here, or those on record, say, as Markdown

Each goes on where it was stopped. Several may run at the same time; a run that another process trains is passed over.

The decision. Effect of an arm: the mean over seeds of the paired difference of its loss after one fitted temperature
(same initial weights, same order) to that of KD at its best tau and with the arm's weights of the terms, with its 95 %
t-interval. An arm helps if the interval lies below 0 and the mean is -0.005 nats or lower. It helps by its temperatures
if that stays so under FACTOR tau2 (else it was a weight of tokens), under FACTOR mean (else the size of the loss) and
under DETACH (else the gradient through the temperatures). It does nothing if the interval holds 0 or the mean
lies above -0.005. The last epoch counts; nothing is chosen on the test part. After the first results came: DTKD's
reference, "fixed" with its weights of the terms (it had been KD), "pair", which has the mean of DTKD's temperatures for
all tokens, FACTOR tau2, and std at tau 2.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("output/text_rules")
RECORD = ROOT / "results" / "text_rules.jsonl"
TEACHER = OUTPUT / "teacher" / "student_best"
# whole rows in float32: the bits of a teacher that runs in every step, for 2.6 GB of disk and half the time
TAUGHT = ["DISTILLER.TEACHER_CKPT", str(TEACHER), "TEACHER_BANK", "lazy", "TEACHER_BANK_DTYPE", "float32"]
TAUGHT += ["TEACHER_BANK_TOP_K", "1024"]
EPOCHS = 2  # of a student
CRITICAL = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by the number of seeds


def kd(tau: float, *more: str) -> list[str]:
    """Return the pairs of KD: cross entropy and KL at tau, each with the weight 1/2."""
    weights = ["KD.LOSS.CE_WEIGHT", "0.5", "KD.LOSS.KD_WEIGHT", "0.5"]
    return ["DISTILLER.TYPE", "KD", "KD.TEMPERATURE", f"{tau:g}", *weights, *more]


def dtkd(rule: str, tau: float, *more: str) -> list[str]:
    """Return the pairs of DTKD without its warm-up: cross entropy, KL under the rule and KL at tau, weighted alike."""
    weights = ["DTKD.ALPHA", "1", "DTKD.BETA", "1", "DTKD.CE_WEIGHT", "1", "DTKD.WARMUP", "0"]
    return ["DISTILLER.TYPE", "DTKD", "DTKD.T", f"{tau:g}", "TEMPERATURE.RULE", rule, *weights, *more]


TUNED = {
    "KD": [(tau, kd(tau)) for tau in (0.5, 1, 2)],
    "KD under std": [(tau, kd(tau, "TEMPERATURE.RULE", "std")) for tau in (0.5, 1, 2)],
    **{f"DTKD, {rule}": [(tau, dtkd(rule, tau)) for tau in (0.5, 1, 2)] for rule in ("fixed", "max_logit", "centred")},
}
WHOLE = ("SOLVER.CHUNK", "0")
PAIR = Path(__file__).with_name("text_pair.py")


def arms(best: dict[str, float]) -> dict[str, list[str]]:
    """Return the arms of the claim by name, at the `best` tau of their rule, or of `centred` where it was not tuned."""
    tau, centred = best["KD"], best["DTKD, centred"]
    return {
        f"KD, tau {tau:g}": kd(tau),
        f"DTKD, fixed, tau {best['DTKD, fixed']:g}": dtkd("fixed", best["DTKD, fixed"]),  # KD with DTKD's weights
        "student alone": ["DISTILLER.TYPE", "NONE"],
        f"DTKD, max_logit, tau {best['DTKD, max_logit']:g}": dtkd("max_logit", best["DTKD, max_logit"]),
        f"DTKD, centred, tau {centred:g}": dtkd("centred", centred),
        f"DTKD, centred_sharpness, tau {centred:g}": dtkd("centred_sharpness", centred),
        f"KD under std, tau {best['KD under std']:g}": kd(best["KD under std"], "TEMPERATURE.RULE", "std"),
        "KD, reverse KL, tau 1": kd(1, "DIVERGENCE.TYPE", "reverse"),
        f"DTKD, pair, tau {centred:g}": dtkd("pair", centred, "EXPERIMENT.PLUGINS", str(PAIR)),
        f"DTKD, centred, tau {centred:g}, DETACH": dtkd("centred", centred, "TEMPERATURE.DETACH", "True"),
        f"DTKD, centred, tau {centred:g}, FACTOR tau2": dtkd("centred", centred, "TEMPERATURE.FACTOR", "tau2"),
        f"DTKD, centred_sharpness, tau {centred:g}, FACTOR tau2": dtkd(
            "centred_sharpness", centred, "TEMPERATURE.FACTOR", "tau2"
        ),
        f"DTKD, centred, tau {centred:g}, FACTOR mean": dtkd("centred", centred, "TEMPERATURE.FACTOR", "mean", *WHOLE),
    }


def name_of(arm: str, seed: int) -> str:
    return f"{arm.replace(', ', ',').replace(' ', '-')},seed{seed}"


def train(name: str, pairs: list[str]) -> None:
    """Train a run by tools/train_ours.py, unless it is finished."""
    if finished(name):
        return
    if "NONE" not in pairs and not TEACHER.is_file():
        sys.exit("there is no teacher yet; run `python3 benchmarks/text_rules.py teacher`")
    words = [str(ROOT / "tools" / "train_ours.py"), "--cfg", str(Path(__file__).with_suffix(".yaml"))]
    words += ["--resume", "auto"]
    pairs = ["EXPERIMENT.NAME", name, "SOLVER.EPOCHS", str(EPOCHS), *pairs]
    subprocess.run([sys.executable, *words, *pairs], check=False)


def last(name: str) -> dict:
    """Return the figures of a run's last epoch, of the one on record where no run is here; {} where there is none."""
    file = OUTPUT / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    if lines:
        return json.loads(lines[-1])
    return {} if OUTPUT.is_dir() else recorded().get(name, {})


@functools.cache
def recorded() -> dict[str, dict]:
    rows = map(json.loads, RECORD.read_text().splitlines() if RECORD.is_file() else [])
    return {row.pop("run"): row for row in rows}


def record() -> None:
    """Write the figures of the last epoch of every finished run, one JSON object a line."""
    names = sorted(path.parent.name for path in OUTPUT.glob("*/metrics.jsonl"))
    rows = [{"run": name} | last(name) for name in names if finished(name)]
    RECORD.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def finished(name: str) -> bool:
    return last(name).get("epoch", 0) >= (6 if name == "teacher" else EPOCHS)


def tau_of_each(shown: bool = False) -> dict[str, float]:
    """Return the tau of each rule with the lowest calibrated loss on the validation part."""
    best = {}
    for rule, choices in TUNED.items():
        names = {tau: name_of(f"tune {rule} {tau:g}", 0) for tau, _ in choices}
        found = {tau: last(name) for tau, name in names.items()}
        missing = [tau for tau, name in names.items() if not finished(name)]
        if missing:
            sys.exit(f"{rule}: not tuned yet at tau {missing}; run `python3 benchmarks/text_rules.py tune`")
        best[rule] = min(found, key=lambda tau: found[tau]["loss_calibrated"])
        if shown:
            cells = (f"{tau:g}: {row['loss_calibrated']:.4f}" for tau, row in found.items())
            print(f"| {rule} | {', '.join(cells)} | {best[rule]:g} |")
    return best


def interval(differences: np.ndarray) -> str:
    """Return mean and 95 % t-interval of paired differences (seeds,) as text."""
    mean, half = differences.mean(), math.nan
    if len(differences) in CRITICAL:
        half = CRITICAL[len(differences)] * differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def table(seeds: range) -> None:
    """Print what tuning chose, and an arm on each line with its figures and its difference to KD at its best tau."""
    print("| rule | calibrated loss by tau (validation, seed 0) | chosen |\n|---|---|---|")
    best = tau_of_each(shown=True)
    found = {}
    for arm in arms(best):
        rows = {seed: last(name_of(arm, seed)) for seed in seeds if finished(name_of(arm, seed))}
        found |= {arm: rows} if rows else {}
    teacher = last("teacher")
    print(f"\nThe teacher, on the validation part: loss {teacher['test_loss']:.4f}, top-1 {teacher['test_acc']:.2f}.\n")
    head = "arm", "runs", "loss", "calibrated", "bits/byte", "top-1", "ECE", "KL to teacher", "fell back"
    print(f"| {' | '.join(head)} | to KD of its weights | to the pair |\n|---|{8 * '---:|'}---|---|")
    losses = {arm: {seed: row["loss_calibrated"] for seed, row in rows.items()} for arm, rows in found.items()}
    references = {
        name: next(arm for arm in arms(best) if arm.startswith(name)) for name in ("KD", "DTKD, fixed", "DTKD, pair")
    }
    for arm, of_seed in found.items():
        rows, own = list(of_seed.values()), np.array(list(losses[arm].values()))
        cells = [f"{np.mean([row['test_loss'] for row in rows]):.4f}"]
        cells.append(f"{own.mean():.4f} ± {own.std(ddof=1) if len(rows) > 1 else math.nan:.4f}")
        for key, form in (("bits_per_byte", ".4f"), ("test_acc", ".2f"), ("ece", ".2f"), ("teacher_kl", ".4f")):
            values = [row[key] for row in rows if key in row]
            cells.append(format(np.mean(values), form) if values else "")
        back = [100 * row["temperature"]["fell_back"] for row in rows if "temperature" in row]
        cells.append(f"{np.mean(back):.1f} %" if back else "")
        for name in ("DTKD, fixed", "DTKD, pair") if arm.startswith("DTKD") else ("KD", ""):
            other = losses.get(references.get(name), {})
            both = [
                losses[arm][seed] - other[seed] for seed in losses[arm] if seed in other and arm != references[name]
            ]
            cells.append(interval(np.array(both)) if both else "")
        print(f"| {arm} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("teacher", "tune", "claim", "record", "table"))
    parser.add_argument("--seeds", type=int, default=3, help="how many; default: %(default)s")
    parser.add_argument("--last-first", action="store_true", help="from the other end, as a second process does")
    a = parser.parse_args()
    turn = -1 if a.last_first else 1
    if a.stage == "teacher":
        train("teacher", ["DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", "gpt4x128", "SOLVER.EPOCHS", "6"])
    elif a.stage == "tune":
        runs = [(f"tune {rule} {tau:g}", pairs) for rule, choices in TUNED.items() for tau, pairs in choices]
        for arm, pairs in runs[::turn]:
            train(name_of(arm, 0), [*pairs, *TAUGHT])
    elif a.stage == "claim":
        runs = [(arm, pairs, seed) for seed in range(a.seeds) for arm, pairs in arms(tau_of_each()).items()]
        for arm, pairs, seed in runs[::turn]:
            more = ["SEED", str(seed), "DATASET.TEXT.TEST", "test", *TAUGHT]
            train(name_of(arm, seed), [*pairs, *more])
    elif a.stage == "record":
        record()
    else:
        table(range(a.seeds))


if __name__ == "__main__":
    main()
