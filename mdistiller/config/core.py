"""The keys that every run has: what a method, a rule or a data set adds stands beside it."""

import re

from mdistiller import registry
from mdistiller.config.keys import Check, Key, add_keys, at_least, below, between, inside, one_of, positive

AUGMENTATIONS = ("crop_flip", "crop", "none", "resized_crop")
DOT_TRAINERS = ("dot", "crd_dot")  # whose optimizer keeps task and distillation apart
TWO_VIEWS = ("ours", "aug")  # which give each sample in a weak and a strong view
FALLS = {"SOLVER.SCHEDULE": ("multistep",)}

add_keys(
    {
        "EXPERIMENT.PROJECT": Key("distill", "Folder under LOG.PREFIX that groups runs.", role="where"),
        "EXPERIMENT.NAME": Key("", "Name of the run's folder; empty: EXPERIMENT.TAG.", role="where"),
        "EXPERIMENT.TAG": Key("default", "Comma-separated labels of the run.", role="where"),
        "EXPERIMENT.PLUGINS": Key(
            [],
            "Python files, or checkouts of a framework built as mdistiller is, to import before the YAML is read: "
            "methods, models, data sets, rules. They are code, and run with your rights.",
            Check(lambda v: all(isinstance(p, str) for p in v), "must be paths of .py files or folders"),
            role="where",
        ),
        "EXPERIMENT.LOGIT_STAND": Key(
            False, "Distil z-scores of the logits (LSKD): another name for TEMPERATURE.RULE std.", distils=True
        ),
        "DATASET.TYPE": Key(
            "cifar100",
            "Data set: cifar100, cifar10, digits, npz; of picture files imagefolder, imagenet, tiny_imagenet; of text "
            "text, python (the source of Python's own library); of images with boxes coco, voc, scenes (drawn).",
            one_of(registry.datasets),
        ),
        "DATASET.ROOT": Key("./data", "Folder that holds the data set; of npz and text the file itself.", role="where"),
        "DATASET.AUGMENT": Key(
            "auto",
            "Augmentation: auto (as the data set declares), crop_flip, crop, none, or, of picture files, resized_crop "
            "(torchvision's RandomResizedCrop, and a flip).",
            one_of(("auto", *AUGMENTATIONS)),
        ),
        "DATASET.MIXUP": Key(0.0, "Alpha of mixup, of all images of a batch with each other; 0: none.", at_least(0)),
        "DATASET.CUTMIX": Key(
            0.0, "Alpha of CutMix; with MIXUP each batch is mixed by one of them; 0: none.", at_least(0)
        ),
        "DATASET.NUM_WORKERS": Key(
            2,
            "Processes that decode picture files ahead of the steps, for training and for tests each; images in memory "
            "need none.",
            at_least(0),
            role="how",
        ),
        "DATASET.TEST.BATCH_SIZE": Key(
            64,
            "Images in an evaluation batch; on CUDA at least 1,000 of 32 x 32 pixels, or as many pixels of larger "
            "ones.",
            at_least(1),
            role="how",
        ),
        "DISTILLER.TYPE": Key(
            "NONE", "Method: a name of distiller_dict. NONE trains the student alone.", one_of(registry.distillers)
        ),
        "DISTILLER.TEACHER": Key(
            "ResNet50",
            "Teacher: a name of cifar_model_dict, timm:NAME or tv:NAME (torchvision's), with DATASET.TYPE imagenet one "
            "of imagenet_model_dict too; of text one of text_model_dict, or hf:PATH, the folder of a model of "
            "transformers; of detection one such as fasterrcnn_resnet8 or tv:fasterrcnn_resnet50_fpn.",
            distils=True,
        ),
        "DISTILLER.STUDENT": Key("resnet32", "Student: a name as for TEACHER."),
        "DISTILLER.TEACHER_CKPT": Key(
            "",
            "Teacher checkpoint, .pth or .safetensors; pretrained: the library's own weights; trunk: ImageNet's, of a "
            "detector's trunk alone; pkg:NAME: those in an installed package; empty: download_ckpts/"
            "<data set>_teachers/<teacher>_vanilla/.",
            role="where",
            distils=True,
        ),
        "DISTILLER.ENSEMBLE": Key(
            [],
            "Further teachers, for methods that compare logits: NAME, whose checkpoint lies where a teacher's does, or "
            "NAME:checkpoint (in quotes where it holds a comma).",
            Check(lambda v: all(isinstance(t, str) for t in v), "must be a list of NAME or NAME:checkpoint"),
            distils=True,
            effect=lambda value: [registry.name_and_file(text)[0] for text in value],
        ),
        "DISTILLER.ENSEMBLE_MEAN": Key(
            "logits",
            "What an ensemble is the mean of: logits, or probabilities (softmax at temperature 1).",
            one_of(("logits", "probabilities")),
            distils=True,
        ),
        "DISTILLER.STUDENT_CKPT": Key(
            "",
            "Weights that the student starts from: a checkpoint, pretrained, trunk or pkg:NAME; empty: new weights.",
        ),
        "DISTILLER.NEW_HEAD": Key(
            False,
            "Where weights are for another number of classes, take all but the last layer, which is new: in the "
            "student, in a teacher that is trained, and in one of which a method compares features alone.",
        ),
        "DISTILLER.TEACHER_SIZE": Key(
            0,
            "Pixels to which a timm: or tv: teacher brings its images; 0: as the data are, or the one size that the "
            "network takes.",
            between(0, 1024),
            distils=True,
        ),
        "DISTILLER.STUDENT_SIZE": Key(0, "The same of the student.", between(0, 1024)),
        "DISTILLER.TRAIN_TEACHER": Key(
            False,
            "Train a missing teacher first, by method NONE with this SOLVER, and store it; fine-tune it where "
            "TEACHER_CKPT is pretrained, trunk or pkg:NAME, or a file under NEW_HEAD.",
            role="where",
            distils=True,
        ),
        "DISTILLER.TEACHER_LR": Key(
            0.0, "Learning rate of the teacher that is trained; 0: SOLVER.LR.", at_least(0), distils=True
        ),
        "DISTILLER.TEACHER_EPOCHS": Key(
            0,
            "Epochs of the teacher that is trained, with LR_DECAY_STAGES at the same shares of them; 0: SOLVER.EPOCHS.",
            between(0, 2**20 - 1),
            distils=True,
        ),
        "DISTILLER.TEACHER_SHARD": Key(
            False,
            "Of several processes (torchrun): each keeps a share of a frozen teacher that is too large for one device "
            "(FSDP2); needs TEACHER_BANK off.",
            role="how",
            distils=True,
        ),
        "SOLVER.TRAINER": Key(
            "base",
            "base; dot: task and distillation gradients keep separate momenta; ours, aug: each sample in a weak and a "
            "strong view; crd: same as base; crd_dot: same as dot.",
            one_of(("base", "crd", *DOT_TRAINERS, *TWO_VIEWS)),
        ),
        "SOLVER.DOT.DELTA": Key(
            0.075,
            "dot: the momenta are MOMENTUM - DELTA for the task and + DELTA for distillation.",
            distils=True,
            only={"SOLVER.TRAINER": DOT_TRAINERS},
        ),
        "SOLVER.BATCH_SIZE": Key(
            64, "Images in a training batch; the last, smaller one is kept unless DROP_LAST.", at_least(1)
        ),
        "SOLVER.DROP_LAST": Key(
            False, "Leave out the images that are left over for a last, smaller batch, others in each epoch."
        ),
        "SOLVER.FREEZE": Key(
            [],
            "Patterns, with * and ?, of the names of the student's parameters that do not learn, such as [layer1.*]. A "
            "batch normalisation all of whose parameters are frozen keeps its statistics too.",
            Check(lambda v: all(isinstance(p, str) for p in v), "must be patterns of names, such as [layer1.*]"),
        ),
        "SOLVER.EPOCHS": Key(240, "Training epochs.", between(1, 2**20 - 1)),
        "SOLVER.EARLY_STOP": Key(
            0,
            "End the run after so many epochs without a new best test accuracy; 0: never. What is chosen by test "
            "accuracy flatters: compare it with runs that stop by the same rule alone.",
            at_least(0),
        ),
        "SOLVER.LR": Key(0.05, "Learning rate of the first epoch.", positive),
        "SOLVER.LR_DECAY_STAGES": Key(
            [150, 180, 210],
            "The rate falls after each of these epochs.",
            Check(
                lambda v: all(a < b for a, b in zip([0, *v], v, strict=False)),
                "must be epochs in rising order, each 1 or more, such as [150, 180, 210]",
            ),
            only=FALLS,
        ),
        "SOLVER.LR_DECAY_RATE": Key(
            0.1, "Factor of each fall.", Check(lambda v: 0 < v <= 1, "must be in (0, 1]"), only=FALLS
        ),
        "SOLVER.WEIGHT_DECAY": Key(0.0001, "L2 penalty on every parameter.", at_least(0)),
        "SOLVER.MOMENTUM": Key(0.9, "SGD momentum.", below(1), only={"SOLVER.TYPE": ("SGD",)}),
        "SOLVER.SCHEDULE": Key(
            "multistep",
            "multistep: the rate falls at LR_DECAY_STAGES; cosine: to 0 along half a wave over EPOCHS.",
            one_of(("multistep", "cosine")),
        ),
        "SOLVER.WARMUP": Key(0.0, "Epochs in which the rate rises linearly from 0.", at_least(0)),
        "SOLVER.TYPE": Key("SGD", "Optimizer: SGD or AdamW (torch's, with its betas).", one_of(("SGD", "AdamW"))),
        "SOLVER.DECAY_NORMS": Key(True, "WEIGHT_DECAY on norms and biases too, the parameters of one dimension."),
        "SOLVER.CLIP": Key(
            0.0, "Largest norm of the whole gradient, which a larger one is scaled to; 0: none.", at_least(0)
        ),
        "SOLVER.LABEL_SMOOTHING": Key(0.0, "Share of a label that all classes have alike.", below(1)),
        "SOLVER.ACCUMULATE": Key(
            1,
            "Parts in which a batch goes through the networks, whose gradients are added: less memory, and statistics "
            "of a batch that are a part's.",
            at_least(1),
        ),
        "SOLVER.CHUNK": Key(
            1024,
            "Text: tokens whose logits exist at a time, in the last layer and the losses; 0: all of a batch's.",
            at_least(0),
            role="how",
            only={"DATASET.TYPE": ("text",)},
        ),
        "SOLVER.EMA": Key(
            0.0,
            "Decay of an exponential average of the student's weights and statistics, such as 0.999; its accuracy is "
            "reported beside the student's; 0: none.",
            below(1),
        ),
        "SOLVER.SYNC_BN": Key(
            False,
            "Of several processes (torchrun): batch normalisations see the statistics of the whole batch, as one "
            "process's do; else each process its own part's, and the first one's running statistics are kept.",
        ),
        "SOLVER.AMP": Key(
            "none",
            "Autocast of the forward pass: none, bf16 or fp16 (CUDA only). Losses stay in float32.",
            one_of(("none", "bf16", "fp16")),
        ),
        "SOLVER.NAN_POLICY": Key(
            "stop",
            "Where a loss or gradient is not finite: stop and name it, or skip the step.",
            one_of(("stop", "skip")),
        ),
        "SOLVER.STEP": Key(
            "auto",
            "How a step runs: eager, graph (a CUDA graph) or compile (torch.compile; on CUDA in a graph too); auto: "
            "graph on CUDA, compile on a CPU where that pays, else eager.",
            one_of(("auto", "eager", "graph", "compile")),
            role="how",
        ),
        "TEMPERATURE.RULE": Key(
            "",
            "Temperature rule of KD, DKD, DTKD, MLKD, DIST, NORMKD or CTKD; empty: the method's own.",
            one_of(registry.temperature_rules, empty=True),
            distils=True,
        ),
        "TEMPERATURE.DETACH": Key(
            False,
            "Stop the gradient through the rule's temperatures; published DTKD lets it flow.",
            distils=True,
        ),
        "TEMPERATURE.PART": Key(
            "all",
            "Part of the divergence of KD, DTKD and DKD: all, target (TCKD) or non_target (NCKD).",
            one_of(("all", "target", "non_target")),
            distils=True,
        ),
        "TEMPERATURE.FACTOR": Key(
            "rule",
            "What scales the divergence: rule (the rule's factor), tau2 (tau squared), mean (the factor "
            "over its mean in the batch).",
            one_of(("rule", "tau2", "mean")),
            distils=True,
        ),
        "DIVERGENCE.TYPE": Key(
            "forward",
            "Divergence of KD, DTKD, NORMKD and CTKD: forward or reverse KL, jsd (generalised Jensen-Shannon), skewed "
            "or skewed_reverse KL, tv (total variation).",
            one_of(("forward", "reverse", "jsd", "skewed", "skewed_reverse", "tv")),
            distils=True,
        ),
        "DIVERGENCE.BETA": Key(
            0.5,
            "jsd: share beta of the teacher in the mixture; near 0 it is like forward, near 1 like reverse.",
            inside,
            distils=True,
            only={"DIVERGENCE.TYPE": ("jsd",)},
        ),
        "DIVERGENCE.SKEW": Key(
            0.1,
            "skewed: share of a side's own probabilities in what it is compared with.",
            inside,
            distils=True,
            only={"DIVERGENCE.TYPE": ("skewed", "skewed_reverse")},
        ),
        "LOG.TEMPERATURE": Key(
            "summary",
            "Record the rule's temperatures: off, summary (an epoch) or samples (each sample too).",
            one_of(("off", "summary", "samples")),
            role="where",
        ),
        "LOG.TENSORBOARD_FREQ": Key(
            500, "Steps between TensorBoard points inside an epoch.", at_least(1), role="where"
        ),
        "LOG.PRINT_FREQ": Key(
            0,
            "Steps between lines inside an epoch where stdout is no terminal, as in a batch job; 0: none. A terminal "
            "has a bar.",
            at_least(0),
            role="where",
        ),
        "LOG.SAVE_CHECKPOINT_FREQ": Key(
            40, "Epochs between the checkpoints epoch_N and student_N.", at_least(1), role="where"
        ),
        "LOG.SAVE_EVERY_SECONDS": Key(
            60.0,
            "Seconds of training between checkpoints inside an epoch, at least; 0: none inside an epoch. kill -9 costs "
            "what came after the last one.",
            at_least(0),
            role="where",
        ),
        "LOG.PREFIX": Key("./output", "Root of all run folders.", Check(bool, "must name a folder"), role="where"),
        "LOG.WANDB": Key(False, "Send figures to Weights & Biases as well (pip install wandb).", role="where"),
        "SEED": Key(
            0,
            "Seeds initialisation, data order and augmentation.",
            Check(lambda v: 0 <= v < 2**32, "must be in [0, 2**32)"),
        ),
        "DETERMINISTIC": Key(False, "The same bits on the same machine on CUDA too, at some cost in speed."),
        "TEACHER_BANK": Key(
            "auto",
            "Teacher's logits on all views of the training set, for logit methods: full (computed first, kept on "
            "disk), lazy (kept as they come), off (a teacher's pass in every step); auto: as the arithmetic says. All "
            "but off give the same numbers.",
            one_of(("auto", "full", "lazy", "off")),
            distils=True,
            effect=lambda value: "off" if value == "off" else "auto",
        ),
        "TEACHER_BANK_DTYPE": Key(
            "float16",
            "What the bank keeps, float16 or float32; auto rounds to it without a bank too.",
            one_of(("float16", "float32")),
            distils=True,
        ),
        "TEACHER_BANK_TOP_K": Key(
            0,
            "How many logits of a row the bank keeps, the largest, with five numbers of all others. Text: 0 is no "
            "bank, the teacher runs within the step; as many as the vocabulary has: whole rows. Streamed pictures, by "
            "KD and DKD at temperature 1: 0 is whole rows.",
            between(0, 2**14),
            distils=True,
        ),
        "TEACHER_BANK_FOLDER": Key("", "Where banks lie; empty: beside the teacher's checkpoint.", role="where"),
        "DEVICE": Key(
            "auto",
            "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps.",
            Check(
                lambda v: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v)), "must be auto, cpu, cuda, cuda:N or mps"
            ),
            role="where",
        ),
    }
)
