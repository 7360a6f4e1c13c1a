"""Hot loops: one file per operation. The import of this folder costs only jax."""

if __name__ == "pallas_kernels":  # found through the checkout's root, not through the package
    raise ImportError("import jaxlib_methods.pallas_kernels instead of pallas_kernels")
