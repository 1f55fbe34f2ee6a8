"""What a configuration asks of a method that it does not do, said before anything is built."""

from mdistiller.config import PLUGINS, TWO_VIEWS, Config, get
from mdistiller.distillers import RuleDistiller, distiller_dict, rule_name
from mdistiller.engine.tasks import task_of_run
from mdistiller.errors import UserError


def refuse_unused(cfg: Config) -> None:
    """Raise UserError where the configuration asks of the method what it does not do. (NONE may train a teacher, with
    its student's settings.)
    """
    method, cls = cfg.DISTILLER.TYPE, distiller_dict[cfg.DISTILLER.TYPE]
    task = task_of_run(cfg)
    task.refuse(cfg, cls)

    def takers(attribute: str) -> str:
        having = {name for name, taker in distiller_dict.active.items() if getattr(taker, attribute, False)}
        return ", ".join(sorted(name for name in having if task.method(name)))

    if cfg.SOLVER.TRAINER in TWO_VIEWS and not cls.takes_strong_view:
        raise UserError(
            f"SOLVER.TRAINER: {cfg.SOLVER.TRAINER} gives a second, strong view, which {method} does not take; set "
            f"SOLVER.TRAINER base, or use {takers('takes_strong_view')}"
        )
    refuse_soft_labels(cfg, cls)
    if not cls.needs_teacher:
        return
    if cfg.DISTILLER.TEACHER_SHARD and cls.takes_teacher_logits and cfg.TEACHER_BANK != "off":
        raise UserError("DISTILLER.TEACHER_SHARD: a teacher in parts runs within the step; set TEACHER_BANK off")
    if cfg.TEACHER_BANK_TOP_K and not task.top_k and not softens_by_1(cfg, cls):
        raise UserError(
            "TEACHER_BANK_TOP_K: of pictures the largest logits are enough at temperature 1 alone; take KD or DKD with "
            "temperature 1 and RULE fixed, or leave it out"
        )
    if cfg.DISTILLER.ENSEMBLE and cls.needs_features:
        raise UserError(
            f"DISTILLER.ENSEMBLE: {method} compares features, of which several teachers have no mean; name one, or "
            "take a method that compares logits, such as KD"
        )
    stand = cfg.EXPERIMENT.LOGIT_STAND
    if stand and distiller_dict.own.get(method) is not cls:  # a method file may read the key itself, as LSKD's do
        stand = not any("LOGIT_STAND" in PLUGINS[digest].text for digest in cfg.plugins)
    rule = "EXPERIMENT.LOGIT_STAND" if stand else "TEMPERATURE.RULE"
    if (cfg.TEMPERATURE.RULE or stand) and not issubclass(cls, RuleDistiller):
        raise UserError(f"{rule}: {method} takes no temperature rule; leave it out, or use {takers('own_rule')}")
    if cfg.TEMPERATURE.PART != "all" and not cls.has_parts:
        raise UserError(f"TEMPERATURE.PART: {method} has no parts; leave it out, or use {takers('has_parts')}")
    if cfg.TEMPERATURE.PART != "all" and cls.takes_divergence and cfg.DIVERGENCE.TYPE != "forward":
        raise UserError(
            f"TEMPERATURE.PART: the divergence {cfg.DIVERGENCE.TYPE} has no parts; set DIVERGENCE.TYPE forward, or "
            "TEMPERATURE.PART all"
        )


def refuse_soft_labels(cfg: Config, cls: type) -> None:
    """Raise UserError where labels are to be smoothed or images mixed, and the method or trainer cannot have that."""
    soft = [key for key in ("DATASET.MIXUP", "DATASET.CUTMIX", "SOLVER.LABEL_SMOOTHING") if get(cfg, key)]
    if soft and (cls.needs_labels or cfg.TEMPERATURE.PART != "all"):
        what = cfg.DISTILLER.TYPE if cls.needs_labels else f"TEMPERATURE.PART {cfg.TEMPERATURE.PART}"
        raise UserError(f"{soft[0]}: {what} needs the one label of each image, which is none then; leave it out")
    if cfg.SOLVER.TRAINER in TWO_VIEWS and (cfg.DATASET.MIXUP or cfg.DATASET.CUTMIX):
        raise UserError(
            f"{soft[0]}: SOLVER.TRAINER {cfg.SOLVER.TRAINER} has two views of each image, which are not mixed"
        )


def softens_by_1(cfg: Config, cls: type) -> bool:
    """Return whether the method is KD or DKD at temperature 1, which a row's largest logits and its logsumexp serve."""
    temperatures = {"KD": "TEMPERATURE", "DKD": "T"}
    method = cfg.DISTILLER.TYPE
    return method in temperatures and cfg[method][temperatures[method]] == 1 and rule_name(cfg, cls.own_rule) == "fixed"
