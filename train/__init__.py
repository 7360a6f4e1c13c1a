"""The trainer: flags, configuration, data, state, step, loop, metrics, checkpoints."""

if __name__ == "train":  # found through the checkout's root, not through the package
    raise ImportError("import jaxlib_methods.train instead of train")
