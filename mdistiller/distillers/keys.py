"""The configuration keys that several methods have, each with its meaning and check in this one place."""

from mdistiller.config import Key, at_least, image_size, positive


def ce_weight(default: float = 1.0) -> Key:
    """Return the key of the cross entropy's weight."""
    return Key(default, "Weight of the cross entropy with the labels.")


def logit_weights(ce: float, kd: float) -> dict[str, Key]:
    """Return the section LOSS of a logit method: the weights of cross entropy and distillation."""
    return {"CE_WEIGHT": ce_weight(ce), "KD_WEIGHT": Key(kd, "Weight of the distillation loss.")}


def feature_weights(feat: float) -> dict[str, Key]:
    """Return the section LOSS of a feature method: the weights of cross entropy and feature loss."""
    return {"CE_WEIGHT": ce_weight(), "FEAT_WEIGHT": Key(feat, "Weight of the feature loss.")}


def temperature(default: float, meaning: str = "Temperature tau of both softmax outputs.") -> Key:
    """Return the key of a temperature, or of the reference that a rule takes."""
    return Key(default, meaning, positive)


def warmup(default: float = 20) -> Key:
    """Return the key of the epochs over which the distillation loss is raised to its weight."""
    return Key(default, "Epochs over which the distillation loss rises to its weight; 0: none.", at_least(0))


def input_size() -> Key:
    """Return the key of the images' size, for methods that build modules by the shapes of features."""
    doc = "Accepted for mdistiller's YAML files; the method's modules are built for the size of the data's images."
    return Key((32, 32), doc, image_size)
