"""Architectures: Flax Linen modules and the pure functions they are made of."""

if __name__ == "models":  # found through the checkout's root, not through the package
    raise ImportError("import jaxlib_methods.models instead of models")
