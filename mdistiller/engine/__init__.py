"""The loop: from a configuration to a trained student."""


def __getattr__(name: str) -> object:
    if name == "trainer_dict":  # mdistiller's; later than the modules that it needs
        from mdistiller.engine.base_trainer import trainer_dict

        return trainer_dict
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
