"""What the engine does otherwise for text."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from yacs.config import CfgNode

from mdistiller.config import Config
from mdistiller.dataset import TokenBatches, TokenSet
from mdistiller.distillers import Distiller, LogitDistiller, Vanilla, distiller_dict, rule_name
from mdistiller.engine.ranks import Ranks
from mdistiller.engine.task import FOR_IMAGES, Task, refuse_keys
from mdistiller.engine.text_scores import TextTest
from mdistiller.errors import UserError
from mdistiller.models import build_model, check_text_network


class Text(Task):
    """Blocks of tokens, of each of which the next is learned."""

    eager = True  # a loss in chunks could not be a graph
    top_k = True
    new_head = False

    def classes(self, num: int) -> str:
        return f"a vocabulary of {num:,}"

    def network(
        self, cfg: CfgNode, data: TokenSet, side: str, given: nn.Module | None = None, layers: Sequence[str] = ()
    ) -> nn.Module:
        name = cfg.DISTILLER[side]
        if given is not None:
            raise UserError(f"{side.lower()}: a network of text is built by its name; pass one, such as gpt2x64")
        model = build_model(name, data.num_classes, cfg.DATASET.TYPE)
        check_text_network(model, name, data.num_classes, data.train_images.shape[1])
        check_tokenizer(model, name, data)
        return model

    def building(self, data: TokenSet) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def finish(self, distiller: nn.Module, cfg: CfgNode) -> None:
        set_chunk(distiller, cfg)

    def tester(
        self, batches: TokenBatches, data: TokenSet, cfg: CfgNode, teacher: nn.Module | None, ranks: Ranks
    ) -> TextTest:
        return TextTest(batches, data.bytes_a_token, cfg.SOLVER.AMP, teacher, ranks)

    def refuse(self, cfg: Config, cls: type) -> None:
        """Raise UserError where the method cannot learn from text, or where what is asked for is for images."""
        super().refuse(cfg, cls)
        if not cls.rowwise:
            takers = ", ".join(sorted(name for name, taker in distiller_dict.active.items() if taker.rowwise))
            raise UserError(
                f"DISTILLER.TYPE: {cfg.DISTILLER.TYPE} compares more than each token's logits, as {cfg.DATASET.TYPE} "
                f"has them; use {takers}"
            )
        refuse_keys(cfg, (*FOR_IMAGES, "DISTILLER.NEW_HEAD"), "images", "text")
        if cfg.SOLVER.TRAINER not in ("base", "crd"):
            raise UserError(f"SOLVER.TRAINER: {cfg.SOLVER.TRAINER} is for images; set SOLVER.TRAINER base")
        if cls.needs_teacher and cfg.TEACHER_BANK in ("lazy", "full") and not cfg.TEACHER_BANK_TOP_K:
            raise UserError(
                f"TEACHER_BANK: {cfg.TEACHER_BANK} needs to know how many of a token's logits to keep; set "
                "TEACHER_BANK_TOP_K 64"
            )


def check_tokenizer(network: nn.Module, name: str, data: TokenSet) -> None:
    """Raise UserError where a network begins with weights that a folder has for another tokenizer than the text's."""
    file = Path(getattr(network, "path", "")) / "tokenizer.json"
    if not (getattr(network, "loaded", False) and data.tokenizer and file.is_file()):
        return
    if hashlib.sha256(file.read_bytes()).hexdigest() != data.tokenizer:
        raise UserError(
            f"{name}: begins with weights for another tokenizer than the text's; "
            f"set DATASET.TEXT.TOKENIZER {file.parent}"
        )


def set_chunk(distiller: Distiller, cfg: CfgNode) -> None:
    """Let the method see SOLVER.CHUNK tokens at a time, where its step is one that can. Raises UserError where it is
    asked to and needs all of a batch.
    """
    size = cfg.SOLVER.CHUNK
    if type(distiller).forward_train in (Vanilla.forward_train, LogitDistiller.forward_train):
        if distiller.needs_batch and (size or cfg.SOLVER.ACCUMULATE > 1):
            what = "FACTOR mean" if distiller.factor == "mean" else f"RULE {rule_name(cfg, distiller.own_rule)}"
            raise UserError(
                f"TEMPERATURE.{what} looks at all tokens of a batch; set SOLVER.CHUNK 0 and SOLVER.ACCUMULATE 1"
            )
        distiller.chunk = size
