"""The training state, born sharded."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from jaxlib_methods.method import Method
from jaxlib_methods.models import partitioning

SHARDED_SHARE = 0.95  # of the parameters' bytes, where the mesh has axes to cut them


class TrainState(NamedTuple):
    """What an optimiser step changes.

    step: int32 scalar, the number of steps done. method_state: see `Method.init_state`.
    """

    step: Any
    params: Any
    opt_state: Any
    method_state: Any = ()


def abstract_state(
    method: Method, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed.

    Raises ValueError where the mesh does not divide a parameter, or cuts too few of them.
    """
    boxed = jax.eval_shape(method.init_params, jax.random.key(0))
    params = partitioning.unbox(boxed)
    shardings = partitioning.param_shardings(boxed, mesh)
    _check_sharded(params, shardings, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = partitioning.shardings_like_params(opt_state, params, shardings, mesh)
    boxed_state = jax.eval_shape(_init_state(method), jax.random.key(0))
    method_state = partitioning.unbox(boxed_state)
    state_shardings = partitioning.param_shardings(boxed_state, mesh)
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh)),
        _placed(params, shardings),
        _placed(opt_state, opt_shardings),
        _placed(method_state, state_shardings),
    )


def _init_state(method: Method) -> Callable[[jax.Array], Any]:
    return method.init_state or (lambda key: ())


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _check_sharded(params: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> None:
    axes = [name for name in ("fsdp", "tensor") if mesh.shape[name] > 1]
    share = partitioning.sharded_fraction(params, shardings, axes=axes)
    if axes and share < SHARDED_SHARE:
        raise ValueError(
            f"only {share:.0%} of the parameters' bytes are cut along mesh axes {axes}, at least "
            f"{SHARDED_SHARE:.0%} must be; name the large parameters' axes in the model"
        )


def create_state(
    method: Method, optimizer: optax.GradientTransformation, abstract: TrainState, key: jax.Array
) -> TrainState:
    """A new state. Every device computes only its own part of it."""

    def create(key: jax.Array) -> TrainState:
        params = partitioning.unbox(method.init_params(key))
        method_state = partitioning.unbox(_init_state(method)(key))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), method_state)

    return jax.jit(create, out_shardings=shardings_of(abstract))(key)


def with_params(
    method: Method,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    params: Any,
    key: jax.Array,
) -> TrainState:
    """A new state around given parameters of the model: step 0 and a fresh optimiser.

    What the method adds to the model's parameters is created as in `create_state`.
    """
    places = shardings_of(abstract)

    def create(key: jax.Array) -> Any:
        new = partitioning.unbox(method.init_params(key))
        added = {name: leaves for name, leaves in new.items() if name not in params}
        return added, partitioning.unbox(_init_state(method)(key))

    added = {name: place for name, place in places.params.items() if name not in params}
    new, method_state = jax.jit(create, out_shardings=(added, places.method_state))(key)
    # Placed as the step gives them back: otherwise its second call is compiled again.
    params = jax.device_put({**params, **new}, places.params)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), places.step)
    return TrainState(step, params, opt_state, method_state)


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def num_params(params: Any) -> int:
    """Number of scalars in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
