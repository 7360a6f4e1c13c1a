"""Descents: by hand, their outer derivative in every mode, what has none, and memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.descent import Trajectory, descend, descend_freely
from jaxlib_methods.pallas_kernels.attention import Keys, attention

B, R, M, D, V = 2, 3, 5, 4, 7
NUM_STEPS = 2


def bowl(curvature: Any, centre: Any, y: jax.Array) -> jax.Array:
    return 0.5 * curvature * (y - centre) ** 2


def test_two_steps_by_hand():
    # E = (y - 3)^2 from 0 with a quarter of the slope: 0 -> 1.5 -> 2.25, slopes -6 and -3.
    path = descend(bowl, 2.0, 3.0, jnp.zeros(1), step_size=0.25, num_steps=2)
    np.testing.assert_allclose(path.candidates[:, 0], [1.5, 2.25])
    np.testing.assert_allclose(path.energies[:, 0], [9.0, 2.25])
    np.testing.assert_allclose(path.slopes, [6.0, 3.0])


@pytest.mark.parametrize("memory", ["recompute", "save"])
@pytest.mark.parametrize(
    # y2 = x + (1 - alpha a)^2 (y0 - x), or, from a constant y1, y1 - alpha a (y1 - x).
    ("gradient", "want"),
    [("all_steps", (0.75, 0.75, 0.25, 6.0)), ("one_step", (0.375, 0.5, 0.0, 3.0))],
)
def test_derivatives_of_two_steps_by_hand(memory, gradient, want):
    def last(curvature: Any, centre: Any, y: Any, alpha: Any) -> jax.Array:
        path = descend(
            bowl, curvature, centre, y[None], step_size=alpha, num_steps=2,
            gradient=gradient, memory=memory,
        )  # fmt: skip
        return path.candidates[-1, 0]

    arguments = [jnp.float32(x) for x in (2.0, 3.0, 0.0, 0.25)]
    got = jax.jit(jax.grad(last, argnums=(0, 1, 2, 3)))(*arguments)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# An energy as a user might write it: attention in tiles, layers under scan and checkpoint, indices
# among the context, and arrays (iota) that depend on no argument.


def energy(params: Any, context: Any, y: jax.Array) -> jax.Array:
    x = y @ params["read"] + params["table"][context["index"]][:, None]
    keys = Keys(*(context[n] for n in ("key", "value", "key_positions", "key_segments")))

    def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        own = (jnp.tanh(x)[:, :, None], jnp.sin(x)[:, :, None])
        rows = {"positions": context["positions"], "segments": context["segments"]}
        mixed = attention(x[:, :, None], keys, own=own, tile=(2, 2), **rows)[0][:, :, 0]
        return x + jnp.tanh(mixed @ kernel + jnp.arange(float(D))[None, None] / D), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.sum(jnp.sin(x) * x, axis=-1)


@functools.cache
def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Parameters, context, candidate and a step size of the given shape, float64."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    params = {"read": normal(V, D), "table": normal(3, D), "layers": normal(2, D, D)}
    context = {
        "index": jnp.array([2, 0], jnp.int32),
        "key": normal(B, M, 1, D),
        "value": normal(B, M, 1, D),
        "key_positions": jnp.array([[0, 1, 2, 3, 0]] * B, jnp.int32),
        "key_segments": jnp.array([[1, 1, 1, 2, 0], [1, 2, 2, 2, -1]], jnp.int32),
        "positions": jnp.array([[0, 1, 2], [0, 1, 3]], jnp.int32),
        "segments": jnp.array([[1, 1, 1], [1, 2, 2]], jnp.int32),
    }
    return params, context, normal(B, R, V), 0.3 + 0.1 * jnp.abs(normal(*shape))


SCALAR, EACH = (), (B, R, 1)


def loss(candidates: Any) -> jax.Array:
    """Something of every step, of curvature everywhere."""
    return sum(
        (jnp.mean(jnp.sin(z * (k + 1)) + z**2) for k, z in enumerate(candidates)), jnp.zeros(())
    )


def start(z: jax.Array, k: jax.Array) -> jax.Array:
    return jax.nn.softmax(z * (1 + k), axis=-1)


def context_at(context: Any, k: jax.Array) -> Any:
    return context | {"key": context["key"] * (1 + 0.5 * k)}


def path_of(args: Any, **policies: Any) -> Trajectory:
    params, context, z, alpha = args
    return descend(
        energy, params, context, z, step_size=alpha, num_steps=NUM_STEPS, start=start,
        context_at=context_at, **policies,
    )  # fmt: skip


def by_hand(args: Any, frozen: Any = None) -> list[jax.Array]:
    """The same descent, unrolled, from given beginnings of each step where `frozen` is given."""
    params, context, z, alpha = args
    path = []
    for k in range(NUM_STEPS):
        y = start(z if frozen is None else frozen[k], jnp.int32(k))
        here = context_at(context, jnp.int32(k))
        z = y - alpha * jax.grad(lambda y, here=here: energy(params, here, y).sum())(y)
        path.append(z)
    return path


def slopes(fn: Any, args: Any) -> Any:
    gradient = jax.jit(jax.grad(fn, allow_int=True))(args)
    return jax.tree.map(
        lambda g: np.zeros(g.shape) if g.dtype == jax.dtypes.float0 else g, gradient
    )


@functools.cache
def found(shape: tuple[int, ...], gradient: str, memory: str) -> Any:
    def of(args: Any) -> jax.Array:
        return loss(path_of(args, gradient=gradient, memory=memory).candidates)

    return slopes(of, arguments(shape))


def difference(fn: Any, args: Any) -> tuple[float, Any]:
    """The central difference of `fn` in a direction over all floating arguments; the direction."""
    rng = np.random.default_rng(1)
    way = jax.tree.map(
        lambda x: rng.normal(size=x.shape) if x.dtype == jnp.float64 else np.zeros(x.shape), args
    )

    def along(step: float) -> jax.Array:
        return fn(
            jax.tree.map(lambda x, w: x + step * w if x.dtype == jnp.float64 else x, args, way)
        )

    step = 1e-5
    return float(along(step) - along(-step)) / (2 * step), way


def assert_close(got: Any, want: Any, rtol: float) -> None:
    """Each leaf to `rtol` of its largest entry."""

    def check(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max(initial=0)))

    jax.tree.map(check, got, want)


@pytest.mark.parametrize(
    ("gradient", "shape"), [("all_steps", SCALAR), ("all_steps", EACH), ("one_step", SCALAR)]
)
def test_both_memories_give_the_slope_of_the_loss(gradient, shape):
    with jax.enable_x64(True):
        args = arguments(shape)
        recompute, save = (found(shape, gradient, m) for m in ("recompute", "save"))
        assert_close(recompute, save, 1e-12)
        frozen = None
        if gradient == "one_step":  # the beginnings stay where they are while the rest moves
            frozen = [args[2], by_hand(args)[0]]
        slope, way = difference(jax.jit(lambda a: loss(by_hand(a, frozen))), args)
        parts = jax.tree.map(lambda g, w: np.sum(g * w), recompute, way)
        np.testing.assert_allclose(sum(jax.tree.leaves(parts)), slope, rtol=1e-6)
        assert all(np.any(g) for g in jax.tree.leaves(recompute[0]))
        assert np.all(recompute[3])
        assert np.any(recompute[1]["value"])


def test_one_step_stops_the_gradient_between_steps():
    with jax.enable_x64(True):
        args = arguments(SCALAR)

        def stopped(args: Any) -> jax.Array:
            first = by_hand(args)[0]
            beginnings = [jax.lax.stop_gradient(x) for x in (args[2], first)]
            return loss(by_hand(args, beginnings))

        want = slopes(stopped, args)
        one, every = (found(SCALAR, g, "recompute") for g in ("one_step", "all_steps"))
        assert_close(one, want, 1e-12)
        assert not np.any(one[2])
        assert np.any(every[2])
        differs = [
            np.abs(a - b).max() > 1e-3 * np.abs(b).max()
            for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(every[0]), strict=True)
        ]
        assert all(differs)


def test_inside_vmap_scan_and_checkpoint():
    with jax.enable_x64(True):
        params, context, z, alpha = arguments(SCALAR)
        several = jnp.stack([z, jnp.cos(z)])

        def one(params: Any, z: jax.Array) -> jax.Array:
            return loss(path_of((params, context, z, alpha)).candidates)

        def scanned(params: Any) -> jax.Array:
            def body(total: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
                return total + jax.checkpoint(one)(params, z), None

            return jax.lax.scan(body, jnp.zeros(()), several)[0]

        def mapped(params: Any) -> jax.Array:
            return jax.vmap(one, in_axes=(None, 0))(params, several).sum()

        def plain(params: Any) -> jax.Array:
            return sum((loss(by_hand((params, context, z, alpha))) for z in several), jnp.zeros(()))

        want = jax.jit(jax.grad(plain))(params)
        assert_close(jax.jit(jax.grad(scanned))(params), want, 1e-12)
        assert_close(jax.jit(jax.grad(mapped))(params), want, 1e-12)


def test_system_1_has_the_published_gradient():
    # Of (1/N) sum_k CE(z_k): v_k = (softmax(z_k) - target) / n is constant, and
    # dL/dtheta = -alpha / N sum_k d/dtheta <v_k, dE/dp_(k-1)>;  dL/dalpha = -1/N sum_k <v_k, dE/dp>
    with jax.enable_x64(True):
        args = arguments(SCALAR)
        params, context, z0, alpha = args
        target = jax.nn.one_hot(jnp.array([[1, 4, 6], [0, 3, 1]]), V, dtype=jnp.float64)

        def published(params: Any, alpha: jax.Array) -> jax.Array:
            path = path_of((params, context, z0, alpha), gradient="one_step").candidates
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(path) * target[None], -1))

        @jax.jit
        def formula(params: Any, alpha: jax.Array) -> Any:
            ends, z = by_hand(args), z0
            by_theta, by_alpha = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
            for k, end in enumerate(ends):
                p, here = start(z, jnp.int32(k)), context_at(context, jnp.int32(k))
                v = (jax.nn.softmax(end) - target) / (B * R)

                def directional(params: Any, p: Any = p, here: Any = here, v: Any = v) -> jax.Array:
                    return jnp.vdot(jax.grad(lambda p: energy(params, here, p).sum())(p), v)

                slope, of_theta = jax.value_and_grad(directional)(params)
                by_theta = jax.tree.map(
                    lambda a, b: a - alpha / NUM_STEPS * b, by_theta, of_theta
                )  # fmt: skip
                by_alpha, z = by_alpha - slope / NUM_STEPS, end
            return by_theta, by_alpha

        got = jax.jit(jax.grad(published, argnums=(0, 1)))(params, alpha)
        assert_close(got, formula(params, alpha), 1e-11)


def test_a_free_descent_arrives_there_too_and_has_no_derivative():
    with jax.enable_x64(True):
        args = arguments(EACH)

        @jax.jit
        def free(args: Any, num_steps: jax.Array) -> jax.Array:
            params, context, z, alpha = args
            return descend_freely(
                energy, params, context, z, step_size=alpha, num_steps=num_steps, start=start,
                context_at=context_at,
            )  # fmt: skip

        for n, want in enumerate([args[2], *by_hand(args)]):
            np.testing.assert_allclose(free(args, jnp.int32(n)), want, rtol=1e-12, atol=1e-14)
        gradient = slopes(lambda a: jnp.sum(free(a, jnp.int32(2)) ** 2), args)
        assert not any(np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("memory", ["recompute", "save"])
def test_energies_and_slopes_are_for_reading_only(memory):
    def read(curvature: jax.Array) -> jax.Array:
        path = descend(
            bowl, curvature, 3.0, jnp.ones(2), step_size=0.1, num_steps=2, gradient="one_step",
            memory=memory,
        )  # fmt: skip
        return jnp.sum(path.energies) + jnp.sum(path.slopes)

    value, slope = jax.value_and_grad(read)(jnp.float32(2.0))
    assert value > 0
    assert slope == 0


def test_impossible_descents_are_refused():
    run: Any = functools.partial(descend, bowl, 1.0, 1.0, jnp.zeros(1), step_size=1.0)
    with pytest.raises(ValueError, match="num_steps 0 must be at least 1"):
        run(num_steps=0)
    with pytest.raises(ValueError, match=r"gradient 'none' is unknown; .*'one_step', 'all_steps'"):
        run(num_steps=1, gradient="none")
    with pytest.raises(ValueError, match=r"memory 'keep' is unknown; .*'recompute', 'save'"):
        run(num_steps=1, memory="keep")


def test_recomputing_keeps_one_candidate_a_step():
    rows, width, hidden = 64, 16, 128

    def deep(params: Any, context: Any, y: jax.Array) -> jax.Array:
        del context
        return jnp.tanh(jnp.tanh(y @ params["in"]) @ params["through"]).sum(-1)

    params = {
        "in": jax.ShapeDtypeStruct((width, hidden), jnp.float32),
        "through": jax.ShapeDtypeStruct((hidden, hidden), jnp.float32),
    }
    y = jax.ShapeDtypeStruct((rows, width), jnp.float32)

    def temporary(memory: Any, num_steps: int) -> int:
        def last(params: Any, y: jax.Array) -> jax.Array:
            path = descend(
                deep, params, (), y, step_size=0.1, num_steps=num_steps, memory=memory
            )  # fmt: skip
            return jnp.sum(path.candidates[-1] ** 2)

        compiled = jax.jit(jax.grad(last)).lower(params, y).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    recompute, save = (
        (temporary(memory, 40) - temporary(memory, 8)) / 32 for memory in ("recompute", "save")
    )
    candidate = rows * width * 4
    # Those kept for the derivative, those returned, and their cotangents.
    assert candidate <= recompute <= 4 * candidate
    assert save >= 3 * recompute


# A `custom_vjp` called in the forward rule of another, under a scan, differentiated twice: where
# the inner one's body makes an array from nothing, JAX hands its backward rule the wrong residuals.

TABLE = np.array([1.5, 2.5, 3.5])
WEIGHTS = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])


def made_table() -> jax.Array:
    return jnp.arange(3.0) + 1.5


def second_derivative(fn: Any) -> jax.Array:
    def network(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (fn(x * w), None), x, jnp.asarray(WEIGHTS))[0])

    def of_slope(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(network)(x) ** 2)

    return jax.grad(of_slope)(jnp.array([0.3, 0.2, 0.5]))


def nested(table: Any) -> Any:
    def cosine(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
        return (g * jnp.cos(x) * table(),)

    @jax.custom_vjp
    def inner(x: jax.Array) -> jax.Array:
        return jnp.sin(x) * table()

    @jax.custom_vjp
    def outer(x: jax.Array) -> jax.Array:
        return inner(x)

    inner.defvjp(lambda x: (jnp.sin(x) * table(), x), cosine)
    outer.defvjp(lambda x: (inner(x), x), cosine)
    return outer


def test_jax_still_has_the_defect_that_a_descent_step_avoids():
    with jax.enable_x64(True):
        right = second_derivative(lambda x: jnp.sin(x) * TABLE)
        np.testing.assert_allclose(second_derivative(nested(lambda: TABLE)), right, rtol=1e-12)
        wrong = second_derivative(nested(made_table))
    assert not np.allclose(wrong, right, rtol=0.1), (
        "JAX differentiates a custom_vjp inside another's forward rule rightly now: delete this "
        "test, and the warnings against nesting them"
    )


def test_a_descent_step_does_not_meet_that_defect():
    # The same function as an energy: a step is a custom_vjp whose rules hold only plain JAX.
    def layered(weights: jax.Array, context: Any, y: jax.Array) -> jax.Array:
        del context
        return jax.lax.scan(lambda x, w: (jnp.sin(x * w) * made_table(), None), y, weights)[0]

    def by_memory(memory: Any) -> Any:
        def last(weights: jax.Array) -> jax.Array:
            path = descend(
                layered, weights, (), jnp.array([0.3, 0.2, 0.5]), step_size=0.7, num_steps=3,
                memory=memory,
            )  # fmt: skip
            return jnp.sum(path.candidates**2)

        return jax.jit(jax.grad(last))(jnp.asarray(WEIGHTS))

    def plain(weights: jax.Array) -> jax.Array:
        y, total = jnp.array([0.3, 0.2, 0.5]), jnp.zeros(())
        for _ in range(3):

            def of(y: jax.Array) -> jax.Array:
                for w in weights:
                    y = jnp.sin(y * w) * TABLE
                return y.sum()

            y = y - 0.7 * jax.grad(of)(y)
            total = total + jnp.sum(y**2)
        return total

    with jax.enable_x64(True):
        want = jax.jit(jax.grad(plain))(jnp.asarray(WEIGHTS))
        for memory in ("recompute", "save"):
            np.testing.assert_allclose(by_memory(memory), want, rtol=1e-12)
