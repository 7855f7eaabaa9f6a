"""What VeRL calls in every process that imports it: the entry point of the plug-in."""


def register() -> None:
    """Registers the engine and the trainers of the adapter with VeRL."""
