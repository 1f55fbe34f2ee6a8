from .AnnealKD import AnnealKD
from .ContrastKD import ContrastKD
from .CosineKD import CosineKD
from .GramKD import GramKD
from .HintKD import HintKD
from .LogitMSE import LogitMSE
from .MemoryKD import MemoryKD
from .MixKD import MixKD
from .ReuseKD import ReuseKD
from .Smooth import Smooth

distiller_dict = {
    "ANNEALKD": AnnealKD,
    "CONTRASTKD": ContrastKD,
    "COSINEKD": CosineKD,
    "GRAMKD": GramKD,
    "HINTKD": HintKD,
    "LOGITMSE": LogitMSE,
    "MEMORYKD": MemoryKD,
    "MIXKD": MixKD,
    "REUSEKD": ReuseKD,
    "SMOOTH": Smooth,
}
