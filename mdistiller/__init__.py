"""Knowledge distillation of image classifiers: exact, fast, reproducible."""

__version__ = "0.1.0"
