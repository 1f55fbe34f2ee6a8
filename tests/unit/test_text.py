"""Text: its parts, blocks and tokenizers; networks of text; losses in chunks; the figures of a test."""

import functools
import gzip
import hashlib
import math
import os

import numpy as np
import pytest
import torch
from helpers import refused
from torch import nn
from torch.nn import functional as F

from mdistiller.config import load
from mdistiller.dataset import TokenBatches, load_dataset
from mdistiller.dataset import text as source
from mdistiller.dataset._tokens import token_set
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._chunks import chunked
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.text import Text, check_tokenizer
from mdistiller.engine.text_scores import TextTest
from mdistiller.errors import ConfigError
from mdistiller.models import build_model
from mdistiller.models._contract import check_text_network
from mdistiller.registry import temperature_rules

WORDS = ("alpha", "beta", "gamma", "delta", "(", ")", "=", "0", "12", "été")
TEXT = "".join(
    " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + i % 9)) + "\n" for i in range(400)
).encode()
ROWWISE = sorted(name for name, cls in distiller_dict.items() if cls.rowwise)


def options(**own):
    """The section DATASET with those keys of DATASET.TEXT."""
    words = [word for key, value in own.items() for word in (f"DATASET.TEXT.{key}", str(value))]
    return load(None, words).DATASET


@pytest.fixture
def written(tmp_path):
    """TEXT in a file, in a folder of its own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_bytes(TEXT)
    return tmp_path / "data" / "words.txt"


@pytest.fixture
def parts(monkeypatch):
    """The parts of the text that is read next, as they reach the tokenizer."""
    seen, real = {}, source.encoded
    monkeypatch.setattr(source, "encoded", lambda found, *rest: seen.update(found) or real(found, *rest))
    return seen


def test_parts_are_cut_by_position_at_the_ends_of_lines(written, parts):
    load_dataset("text", written, options(BLOCK=16))
    assert b"".join(parts[name] for name in ("train", "valid", "test")) == TEXT
    assert all(part.endswith(b"\n") for part in parts.values())
    assert [round(len(part) / len(TEXT), 2) for part in parts.values()] == [0.9, 0.05, 0.05]


def test_blocks_and_their_next_tokens(written, parts):
    data = load_dataset("text", written, options(BLOCK=16))
    stream = np.frombuffer(parts["train"], np.uint8)
    count = (len(stream) - 1) // 16
    assert data.train_images.shape == (count, 16)
    assert data.train_images.flatten().tolist() == stream[: count * 16].tolist()
    assert data.train_labels.tolist() == stream[1 : count * 16 + 1].tolist()
    assert (data.num_classes, data.bytes_a_token) == (256, 1.0)
    other = load_dataset("text", written, options(BLOCK=16, TEST="test"))
    assert torch.equal(other.train_images, data.train_images)
    assert bytes(other.test_images.flatten().tolist()) == parts["test"][: other.test_images.numel()]
    assert data.digest() != load_dataset("text", written, options(BLOCK=8)).digest()


def test_batches_are_a_function_of_seed_and_epoch(written):
    data = load_dataset("text", written, options(BLOCK=16))

    def order(seed, epoch):
        return TokenBatches(data.train_images, data.train_labels, 4, seed, shuffle=True).plan(epoch)[0]

    assert torch.equal(order(0, 1), order(0, 1))
    assert torch.equal(order(0, 1).sort().values, torch.arange(len(data.train_images)))
    assert not torch.equal(order(0, 1), order(0, 2)) and not torch.equal(order(0, 1), order(1, 1))
    batch = TokenBatches(data.train_images, data.train_labels, 4).batch(torch.tensor([[5, 2]]))
    assert torch.equal(batch.image, data.train_images[[5, 2]].long())
    assert torch.equal(batch.index, torch.cat([torch.arange(80, 96), torch.arange(32, 48)]))
    assert torch.equal(batch.target, data.train_labels[batch.index])
    assert torch.equal(batch.target[:15], batch.image[0, 1:])


def test_packed_files_and_folders(written, tmp_path, capsys):
    plain = load_dataset("text", written, options(BLOCK=16))
    for name in ("words.gz", "words.dict.dz"):
        (tmp_path / name).write_bytes(gzip.compress(TEXT))
        assert load_dataset("text", tmp_path / name, options(BLOCK=16)).digest() == plain.digest()
    (written.parent / "picture.png").write_bytes(b"\x89PNG\0\0")
    (written.parent / ".hidden").write_bytes(b"not read")
    assert load_dataset("text", written.parent, options(BLOCK=16)).digest() == plain.digest()
    assert "1 file with zero bytes passed over, such as picture.png" in capsys.readouterr().out
    short = load_dataset("text", written, options(BLOCK=16, MEGABYTES=0.005))
    assert 0.85 * 5000 < short.train_images.numel() < 0.95 * 5000


def test_a_text_of_one_line_has_three_parts_too(tmp_path):
    (tmp_path / "line.txt").write_bytes(bytes(range(32, 132)) * 10)
    data = load_dataset("text", tmp_path / "line.txt", options(BLOCK=7, TEST="test"))
    assert (data.train_labels.numel(), data.test_labels.numel()) == (896, 49)
    assert data.test_images[0].tolist() == list(range(82, 89)), "the last twentieth"


def test_what_is_no_text_is_one_line(written, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, content in (("short.txt", b""), ("binary.txt", TEXT + b"\0"), ("broken.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(TEXT)[:10] + TEXT)
    os.mkfifo(tmp_path / "pipe.txt")
    for path, own, says in (
        ("cut.gz", {}, "cut.gz: cannot be unpacked"),
        ("pipe.txt", {}, "pipe.txt: is a pipe or a device; pass a text file as DATASET.ROOT"),
        ("nowhere.txt", {}, "nowhere.txt: there is no such file or folder; DATASET.ROOT is a text file"),
        ("empty", {}, "holds no text; DATASET.ROOT is a text file, or a folder of them"),
        ("short.txt", {}, "short.txt: holds no text; DATASET.ROOT is a text file"),
        ("binary.txt", {}, "binary.txt: holds no text"),
        (written, {"BLOCK": 4096}, "the test part has .* take more text, or DATASET.TEXT.BLOCK below 4096"),
        ("broken.gz", {}, "broken.gz: cannot be unpacked"),
    ):
        with refused(says):
            load_dataset("text", tmp_path / path, options(**own))
    with refused("ids must be 0 to 9; got 11"):
        token_set(torch.arange(12), torch.arange(12), 4, 10, "")


def test_a_bpe_is_trained_once_and_kept(written, parts, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    own = options(TOKENIZER="bpe", VOCABULARY=300, BLOCK=16)
    first = load_dataset("text", written, own)
    (kept,) = written.parent.glob(".words.bpe300-*.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(kept))
    assert source.train_bpe(parts["train"], 300) == kept.read_bytes(), "the same for the same text"
    ids = source.encode(tokenizer, TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT.decode() and len(ids) < len(TEXT)
    assert first.bytes_a_token == len(parts["valid"]) / len(source.encode(tokenizer, parts["valid"])) > 1
    monkeypatch.setattr(source, "train_bpe", None)  # neither is done again
    monkeypatch.setattr(source, "encode", None)
    again = load_dataset("text", written, own)
    assert again.digest() == first.digest() and torch.equal(again.train_images, first.train_images)
    monkeypatch.undo()
    named = load_dataset("text", written, options(TOKENIZER=kept, BLOCK=16))
    assert torch.equal(named.train_images, first.train_images)
    (written.parent / "wrong.json").write_text("{}")
    os.mkfifo(written.parent / "pipe.json")
    wrong = ("wrong.json", "cannot be read as a tokenizer.json"), ("gone", "cannot be read"), ("pipe.json", "is a pipe")
    for path, says in wrong:
        with refused(says):
            load_dataset("text", written, options(TOKENIZER=written.parent / path))


def test_a_gpt_sees_no_later_token_and_comes_in_two_parts():
    torch.manual_seed(0)
    network = build_model("gpt2x64", 50, "text").eval()
    ids = torch.randint(0, 50, (2, 12))
    logits, feats = network(ids)
    assert logits.shape == (24, 50) and feats["pooled_feat"].shape == (24, 64)
    torch.testing.assert_close(network.head(network.hidden(ids)), logits)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    other = network(changed)[0].view(2, 12, 50)
    torch.testing.assert_close(other[:, :7], logits.view(2, 12, 50)[:, :7])
    assert ((other - logits.view(2, 12, 50))[:, 7:].abs().amax(2) > 1e-4).all()
    assert torch.equal(network.head.weight, network.embedding.weight)


def distiller(name: str, rule: str = "", chunk: int = 0, vocabulary: int = 40) -> nn.Module:
    """The method on two GPTs, which are the same every time; the teacher's logits are larger, as a trained one's."""
    words = ["DISTILLER.TYPE", name, "DTKD.WARMUP", "0", "DTKD.T", "1.0", *(["TEMPERATURE.RULE", rule] if rule else [])]
    cfg, cls = load(None, words), distiller_dict[name]
    torch.manual_seed(0)
    student, teacher = (build_model(net, vocabulary, "text") for net in ("gpt1x32", "gpt2x64"))
    for network, scale in ((student, 5), (teacher, 10)):
        network.norm.weight.data *= scale
    made = cls(student, teacher if cls.needs_teacher else None, cfg)
    made.chunk = chunk
    return made.train()


def step(made: nn.Module, ids, target) -> tuple[torch.Tensor, dict[str, float], dict[str, torch.Tensor]]:
    """Predicted classes, losses and gradients of one step, whose loss is scaled as a gradient scaler does."""
    logits, losses = made.forward_train(ids, target, epoch=1, index=torch.arange(len(target)))
    (3.0 * sum(losses.values())).backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.requires_grad and p.grad is not None}
    return logits if logits.ndim == 1 else logits.argmax(1), {k: v.item() for k, v in losses.items()}, gradients


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Each gradient agrees to 1e-5; one number that is a sum which all but cancels, to 1e-7 of the largest."""
    most = max(gradient.norm() for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * most, key


def arms() -> list[tuple[str, str]]:
    rules = [name for name, rule in temperature_rules.own.items() if name != "learned" and not rule.needs_batch]
    return [(name, "") for name in ROWWISE] + [("DTKD", name) for name in rules] + [("KD", "learned")]


@pytest.mark.parametrize(("name", "rule"), arms())
def test_chunks_are_the_whole(name, rule):
    torch.manual_seed(1)
    ids, target = torch.randint(0, 40, (3, 11)), torch.randint(0, 40, (33,))
    predicted, losses, gradients = step(distiller(name, rule), ids, target)
    assert losses and gradients
    for size in (1, 7, 32, 33):
        made = distiller(name, rule, size)
        classes, found, grads = step(made, ids, target)
        assert torch.equal(classes, predicted)
        assert found == pytest.approx(losses, rel=1e-6)
        assert grads.keys() == gradients.keys()
        assert_close(grads, gradients)


def test_the_observer_sees_each_token_in_its_place():
    seen = {}

    def observer(index, _student, _teacher, temperatures):
        seen.update(zip(index.tolist(), temperatures.student[:, 0].tolist(), strict=True))

    ids, index = torch.randint(0, 40, (2, 9)), torch.arange(50, 68)
    made = distiller("DTKD", "centred", 5)
    made.observer = functools.partial(observer, index)
    given = made.observer
    made.forward_train(ids, torch.zeros(18, dtype=torch.int64), epoch=1, index=index)
    assert sorted(seen) == index.tolist() and made.observer is given
    whole = made.rule(made.student(ids)[0], made.teacher(ids)[0], 1.0).student[:, 0]
    torch.testing.assert_close(torch.tensor([seen[i] for i in index.tolist()]), whole.detach())


def test_logits_of_no_more_than_a_chunk_exist_at_once():
    rows = []

    class Head(nn.Linear):
        def forward(self, hidden):
            rows.append(len(hidden))
            return super().forward(hidden)

    hidden, target = torch.randn(50, 8, requires_grad=True), torch.zeros(50, dtype=torch.int64)
    _, losses = chunked(lambda v, part: {"ce": F.cross_entropy(v, target[part])}, Head(8, 30), hidden, 16)
    assert rows == [16, 16, 16, 2]
    held = losses["ce"].grad_fn.saved_tensors
    assert sum(part.numel() for part in held) == hidden.numel() + 8 * 30 + 30, "gradients alone are kept"


def library_model(kind: str, vocabulary: int):
    """A tiny model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        own = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
        made = transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **own)
    else:
        own = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        made = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=32, **own)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_of_transformers_is_a_network_of_text(kind, tmp_path):
    model = library_model(kind, 64)
    model.save_pretrained(tmp_path)
    network = build_model(f"hf:{tmp_path}", 50, "text").eval()  # of 64 entries 14 are padding
    ids = torch.randint(0, 50, (2, 9))
    logits = network(ids)[0]
    torch.testing.assert_close(logits, model(input_ids=ids).logits[..., :50].flatten(0, 1))
    torch.testing.assert_close(network.head(network.hidden(ids)), logits)
    assert network.hidden(ids).shape == (18, 16)
    state = network.fetch()
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(5)
    fresh = build_model(f"hf:{tmp_path}", 50, "text").eval()  # the folder says the form alone
    with refused("holds none of model.safetensors"):
        fresh.fetch()
    assert not torch.allclose(fresh(ids)[0], logits)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(ids)[0], logits)
    with refused("has 64 entries in its vocabulary, and the text has 65; set DATASET.TEXT.TOKENIZER"):
        build_model(f"hf:{tmp_path}", 65, "text")


def test_a_folder_fits_the_text_or_says_why_not(tmp_path):
    model = library_model("gpt2", 256)
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(tmp_path)
    network = build_model(f"hf:{tmp_path}", 256, "text")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    check_text_network(network, "hf:x", 256, 32)
    with refused("the model hf:x has 32 positions; set DATASET.TEXT.BLOCK 32"):
        check_text_network(network, "hf:x", 256, 33)
    (tmp_path / "tokenizer.json").write_text("{}")
    data = token_set(torch.zeros(9), torch.zeros(9), 4, 256, "", tokenizer="bytes")
    check_tokenizer(network, "hf:x", data)  # its weights are new
    model.save_pretrained(tmp_path)
    network = build_model(f"hf:{tmp_path}", 256, "text")
    with refused(f"hf:x: begins with weights for another tokenizer.*; set DATASET.TEXT.TOKENIZER {tmp_path}"):
        check_tokenizer(network, "hf:x", data)
    digest = hashlib.sha256(b"{}").hexdigest()
    check_tokenizer(network, "hf:x", token_set(torch.zeros(9), torch.zeros(9), 4, 256, "", tokenizer=digest))


def test_chunks_of_a_library_model_are_the_whole(tmp_path):
    library_model("gpt2", 40).save_pretrained(tmp_path)
    ids, target, found = torch.randint(0, 40, (2, 9)), torch.randint(0, 40, (18,)), []
    for chunk in (0, 5):
        made = distiller("DTKD", "centred", chunk)
        made.student = build_model(f"hf:{tmp_path}", 40, "text").eval()  # without dropout
        found.append(step(made, ids, target))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)
    assert_close(found[1][2], found[0][2])


def test_a_missing_folder_is_one_line(tmp_path):
    words = ["DATASET.TYPE", "text", "DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", f"hf:{tmp_path}/gone"]
    with refused("gone: holds no config.json; name the folder of a model", ConfigError):
        load(None, words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["DISTILLER.TYPE", "CRD"], "DISTILLER.TYPE: CRD compares more than each token's logits"),
        (["DATASET.MIXUP", "0.5"], "DATASET.MIXUP: is for images"),
        (["SOLVER.TRAINER", "dot"], "SOLVER.TRAINER: dot is for images"),
        (["SOLVER.STEP", "compile"], "SOLVER.STEP: on text steps run eagerly"),
    ],
)
def test_what_is_for_images_is_one_line(words, says):
    given = ["DATASET.TYPE", "text", "DISTILLER.STUDENT", "gpt1x32", "DISTILLER.TEACHER", "gpt2x64"]
    with refused(says):
        refuse_unused(load(None, [*given, "DISTILLER.TYPE", "KD", *words]))


def test_a_network_of_ones_own_is_refused_on_text():
    with refused("student: a network of text is built by its name"):
        Text().network(load(), None, "STUDENT", nn.Identity())


class Table(nn.Module):
    """A network of text whose logits stand in a table: those of the token, (V, V)."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table, self.head = nn.Parameter(logits), nn.Identity()

    def hidden(self, ids):
        return self.table[ids].flatten(0, 1)

    def forward(self, ids):
        return self.hidden(ids), {}


@pytest.fixture(scope="module")
def drawn():
    """Blocks of tokens of which each is drawn by the distribution of the one before, and those logits, (12, 12)."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(12, 12, generator=generator)
    chances, stream = logits.softmax(1), [0]
    draws = torch.stack([torch.multinomial(row, 40_000, True, generator=generator) for row in chances])
    for place in range(39_999):
        stream.append(int(draws[stream[-1], place]))
    data = token_set(torch.tensor(stream), torch.tensor(stream), 100, 12, "")
    return TokenBatches(data.test_images, data.test_labels, 16), logits


def test_figures_are_those_of_their_definitions(drawn):
    batches, logits = drawn
    teacher, student = Table(logits), Table(0.5 * logits + 0.1 * torch.randn(12, 12))
    scores = TextTest(batches, 4.0, teacher=teacher)(student)
    ids, labels = batches.images.long(), batches.labels
    with torch.no_grad():
        own, theirs = student.hidden(ids), teacher.hidden(ids)
    assert scores.loss == pytest.approx(F.cross_entropy(own, labels).item(), rel=1e-5)
    assert scores.more["bits_per_byte"] == pytest.approx(scores.loss / math.log(2) / 4)
    assert scores.top1 == pytest.approx(100 * (own.argmax(1) == labels).float().mean().item())
    top5 = (own.topk(5).indices == labels[:, None]).any(1).float().mean()
    assert scores.top5 == pytest.approx(100 * top5.item())
    kl = F.kl_div(own.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    assert scores.more["teacher_kl"] == pytest.approx(kl.item(), rel=1e-4)
    agreed = (own.argmax(1) == theirs.argmax(1)).float().mean()
    assert scores.more["teacher_agreement"] == pytest.approx(100 * agreed.item())


def test_the_calibrated_loss_is_blind_to_scale(drawn):
    batches, logits = drawn
    best = TextTest(batches, 1.0)(Table(logits))
    for scale in (1 / 7, 1 / 3, 1.0, 3.0, 7.0):
        scores = TextTest(batches, 1.0)(Table(scale * logits))
        assert scores.more["loss_calibrated"] == pytest.approx(best.loss, abs=1e-3)
        if scale != 1:
            assert scores.loss > best.loss + 0.1
        assert (scores.more["ece"] < 1) is (scale == 1)


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sequential()])
def test_a_teacher_beside_itself(drawn, head):
    batches, logits = drawn
    test = TextTest(batches, 1.0, teacher=Table(logits))
    test.teacher.head = head
    for _ in range(2):  # its hidden states are kept, unless they are the logits of the whole test
        more = test(Table(logits)).more
        assert more["teacher_kl"] == pytest.approx(0, abs=1e-6) and more["teacher_agreement"] == 100
    assert len(test.kept) == (0 if type(head) is nn.Identity else len(batches))
