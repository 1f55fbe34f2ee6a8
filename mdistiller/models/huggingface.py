"""Causal language models of transformers from a local folder, by the name hf:PATH, as networks of text (gpt.py)."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.errors import UserError
from mdistiller.files import expand
from mdistiller.registry import UnknownName, text_models

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Head(nn.Module):
    """The first `count` rows of a last layer, whose vocabulary may be padded: (N, C) -> (N, count). It shares them."""

    def __init__(self, layer: nn.Module, count: int):
        super().__init__()
        self.layers, self.count = (layer,), count  # in a tuple: its parameters are the model's own, under their name

    def parameters(self, recurse: bool = True):
        return self.layers[0].parameters(recurse)

    def forward(self, hidden: Tensor) -> Tensor:
        bias = self.layers[0].bias
        return F.linear(hidden, self.layers[0].weight[: self.count], None if bias is None else bias[: self.count])


class HuggingFace(nn.Module):
    """The model of a folder, with its weights where it holds some, for the first `num_classes` entries of its
    vocabulary. A model whose logits are more than a linear layer of its last hidden state gives them all at once.
    """

    def __init__(self, num_classes: int, path: str):
        super().__init__()
        import transformers

        self.path, self.num_classes = path, num_classes
        transformers.utils.logging.disable_progress_bar()  # of loading a file
        given = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(path, **given)
            self.loaded = any(os.path.isfile(os.path.join(path, name)) for name in WEIGHTS)
            if self.loaded:
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **given)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
        except Exception as error:  # of whatever the folder holds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"hf:{path}: cannot be built: {reason}") from None
        layer, self.model = model.get_output_embeddings(), model
        self.positions = getattr(config, "max_position_embeddings", None)  # of which a block may have so many
        entries = model.get_input_embeddings().num_embeddings
        if entries < num_classes:
            raise UserError(
                f"hf:{path}: has {entries:,} entries in its vocabulary, and the text has {num_classes:,}; set "
                f"DATASET.TEXT.TOKENIZER {path}, whose tokenizer is the model's"
            )
        self.head: nn.Module = Head(layer, num_classes) if type(layer) is nn.Linear else nn.Identity()
        if isinstance(self.head, Head) and not self._is_linear():
            self.head = nn.Identity()

    def fetch(self) -> dict[str, Tensor]:
        """Return the weights of the folder, which it was built with. Raises UserError where the folder holds none."""
        if not self.loaded:
            raise UserError(f"{self.path} holds none of {', '.join(WEIGHTS)}")
        return self.state_dict()

    @torch.no_grad()
    def _is_linear(self) -> bool:
        training = self.training
        ids = torch.arange(min(self.num_classes, 4))[None]
        logits = self.eval().model(input_ids=ids, use_cache=False).logits[0, :, : self.num_classes]
        own = self.head(self.hidden(ids))
        self.train(training)
        return torch.allclose(own, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))

    def hidden(self, ids: Tensor) -> Tensor:
        """Return what enters the last layer, for ids (B, S): (B S, C); or the logits, see above."""
        if isinstance(self.head, nn.Identity):
            return self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[:, : self.num_classes]
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, dict]:
        hidden = self.hidden(ids)
        return self.head(hidden), {"pooled_feat": hidden}


def _folder(name: str) -> Callable[..., nn.Module]:
    path = str(expand(name))
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UnknownName(f"hf:{name}: holds no config.json; name the folder of a model that lies on this machine")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UnknownName("hf: networks need the package transformers: pip install transformers") from None
    return functools.partial(HuggingFace, path=path)


text_models.libraries["hf"] = _folder
