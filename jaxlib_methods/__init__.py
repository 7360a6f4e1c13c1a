"""Language-model training methods that spend compute in new places, in functional JAX.

Nothing is imported here, so that `from jaxlib_methods import losses` costs only jax.
"""

__version__ = "0.1.0"
