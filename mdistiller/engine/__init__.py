"""Devices, steps and files: from a configuration to a trained student."""
