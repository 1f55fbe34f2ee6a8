"""Keys that nobody here has declared: whether a plug-in reads one, and what to say of one that nobody reads."""

import re
from collections.abc import Iterable

from mdistiller import registry
from mdistiller.config.keys import CFG, KEYS, SECTIONS, leaves
from mdistiller.config.plugins import PLUGINS
from mdistiller.config.values import coerce

# what exists for the purpose of a key that other frameworks have, and such keys' last parts, without underscores
PURPOSES = {
    "SOLVER.SCHEDULE is multistep, which falls at SOLVER.LR_DECAY_STAGES, or cosine": "SCHEDULER LRSCHEDULER SCHED "
    "LRSCHEDULE COSINE COSINELR",
    "the rate falls at SOLVER.LR_DECAY_STAGES": "MILESTONES",
    "SOLVER.EMA, such as 0.999, is the decay of an average of weights": "EMA EMADECAY MODELEMA SWA",
    "the data say how many classes there are": "NUMCLASSES NCLASSES CLASSES",
    "DEVICE cuda, or cuda:N, chooses the device": "GPU GPUS GPUID CUDA",
    "SOLVER.TYPE names the optimizer, SGD or AdamW": "OPTIMIZER OPTIM ADAM ADAMW",
    "SOLVER.AMP bf16 or fp16 is half precision": "FP16 MIXEDPRECISION USEAMP BF16",
    "DISTILLER.TEACHER_CKPT names the teacher's file": "PRETRAINED TEACHERPATH TEACHERWEIGHTS",
    "SOLVER.FREEZE names the parameters that do not learn": "FREEZELAYERS FROZEN FROZENLAYERS",
    "SOLVER.EARLY_STOP ends a run without a new best for so many epochs": "EARLYSTOP EARLYSTOPPING PATIENCE",
    "LOG.PRINT_FREQ is the steps between lines of a log": "PRINTFREQ LOGINTERVAL LOGFREQ",
    "LOG.PREFIX is the root of all run folders": "OUTPUTDIR OUTPUT SAVEDIR WORKDIR",
}


class Known:
    """What is known of keys where the plug-ins `digests` are in use: `text`, theirs, in which keys of theirs are looked
    for; `keys`, {full name: declaration}, without those of which a plug-in's default is of another kind; `sections`.
    """

    def __init__(self, digests: Iterable[str]):
        plugins = [PLUGINS[digest] for digest in digests]
        self.text = "".join(plugin.text for plugin in plugins)
        self.keys, self.sections = dict(KEYS), {*CFG}
        self.closed = {section for plugin in plugins for section in plugin.closed}
        for name, value in (pair for plugin in plugins for pair in plugin.defaults.items()):
            section = name.split(".")[0]
            self.sections.add(section)
            try:
                if name in KEYS and section in SECTIONS:
                    coerce(value, KEYS[name].default)
            except (TypeError, OverflowError):
                self.keys.pop(name, None)

    def reads(self, name: str, is_section: bool) -> bool:
        """Return whether a plug-in may read the key or section `name`: its words are in the text, or its section is
        handed on as a whole and was not registered with its keys, or nobody else has declared its section.
        """
        *sections, last = name.split(".")
        if sections and sections[0] not in self.sections:
            return True
        if not all(self._says(part) for part in sections or [last]):
            return False
        section = ".".join(sections)
        handed_on = rf"\bcfg\.{re.escape(section)}\b(?!\.\w)"
        whole = section and section not in self.closed and re.search(handed_on, self.text)
        return bool(is_section or whole or self._says(last))

    def _says(self, word: str) -> bool:
        return bool(word and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", self.text))  # no \b: a name may be KD++


def unknown_key(full: str, is_section: bool) -> str:
    """Return what to say of a key, or section, that nobody reads."""
    what, known = f"unknown {'section' if is_section else 'key'}", leaves(CFG)
    last = full.rpartition(".")[2]
    word = last.replace("_", "").upper()
    if purpose := next((purpose for purpose, words in PURPOSES.items() if word in words.split()), None):
        return f"{what}; {purpose}"
    sections = {key[: match.start()] for key in known for match in re.finditer(r"\.", key)}
    close = registry.nearest(full, sections if is_section else known)
    if not is_section:  # the section may be what is wrong: look for the last part anywhere
        same = [key for key in known if key.rpartition(".")[2].casefold() == last.casefold()]
        least = [key for key in same if key.count(".") == min(key.count(".") for key in same)]
        close = least if len(least) == 1 or not close else close
    return f"{what}; did you mean {close[0]}?" if close else what
