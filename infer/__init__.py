"""What a finished run is for: restore, generate, evaluate."""

if __name__ == "infer":  # found through the checkout's root, not through the package
    raise ImportError("import jaxlib_methods.infer instead of infer")
