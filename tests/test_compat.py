"""What we use of JAX beyond its documented interface: each name does what we rely on."""

import ast
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import attention_jax
from attention_jax.core import compat

ROOT = pathlib.Path(attention_jax.__file__).parents[1]


def doubled():
    """A primitive of our own with every rule: twice its argument."""
    double = compat.Primitive("double")
    double.def_impl(lambda x: 2 * x)
    double.def_abstract_eval(lambda x: x)
    lowered = compat.mlir.lower_fun(lambda x: 2 * x, multiple_results=False)
    compat.mlir.register_lowering(double, lowered)
    compat.ad.deflinear(double, lambda t: [double.bind(t)])
    compat.batching.primitive_batchers[double] = lambda xs, axes: (double.bind(*xs), *axes)
    return double


def test_a_primitive_and_its_rules():
    double, x = doubled(), jnp.arange(3.0)
    chex.assert_trees_all_equal(jax.jit(double.bind)(x), 2 * x)
    chex.assert_trees_all_equal(jax.vmap(double.bind)(x), 2 * x)
    chex.assert_trees_all_equal(jax.grad(lambda x: double.bind(x).sum())(x), 0 * x + 2)


def test_a_tangent_that_is_zero_has_a_type_of_its_own():
    double, recorded = compat.Primitive("double_of_first"), []
    double.def_impl(lambda x, y: 2 * x)

    def rule(primals, tangents):
        recorded.extend(type(t) is compat.ad.Zero for t in tangents)
        return double.bind(*primals), compat.ad.Zero(jax.typeof(primals[0]).to_tangent_aval())

    compat.ad.primitive_jvps[double] = rule
    _, tangent = jax.jvp(lambda x: double.bind(x, 1.0), (1.0,), (1.0,))
    assert recorded == [False, True]
    assert tangent == 0.0


def test_a_jaxpr_has_equations_with_primitives_that_have_names():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(0.0).jaxpr
    assert isinstance(jaxpr, compat.Jaxpr)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["sin", "add"]


def test_a_closed_jaxpr_can_be_given_other_constants():
    table = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda i: 2.0 * table[i])(0)
    again = compat.ClosedJaxpr(closed.jaxpr, [table + 1])
    assert compat.jaxpr_as_fun(again)(2) == [6.0]
    literals = [x for e in closed.eqns for x in e.invars if isinstance(x, compat.Literal)]
    assert 2.0 in [float(x.val) for x in literals]


def test_run_again_keeps_the_rules_of_a_function():
    relu = jax.make_jaxpr(jax.nn.relu)(1.0)
    (call,) = (e for e in relu.eqns if "call_jaxpr" in e.params)

    def again(x):
        return compat.run_again(call.primitive, [x], dict(call.params))[0]

    assert [jax.grad(again)(x) for x in (-1.0, 0.0, 2.0)] == [0.0, 0.0, 1.0]
    (sine,) = jax.make_jaxpr(jnp.sin)(1.0).eqns
    assert compat.run_again(sine.primitive, [jnp.float32(0)], dict(sine.params)) == [0.0]


def test_varies_along_the_axes_that_shard_map_splits():
    recorded = {}

    def body(x, y):
        recorded.update(x=compat.varies(jax.typeof(x)), y=compat.varies(jax.typeof(y)))
        return x

    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    jax.shard_map(body, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))(
        jnp.zeros(4), jnp.zeros(4)
    )
    assert recorded == {"x": {"i"}, "y": set()}
    assert compat.varies(jax.typeof(jnp.zeros(4))) == set()


def test_like_varies_as_its_model():
    recorded = {}

    def body(x):
        recorded.update(result=compat.like(jax.typeof(x), (3, 5), jnp.bfloat16))
        return x

    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    jax.shard_map(body, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(jnp.zeros(4))
    result = recorded["result"]
    assert (result.shape, result.dtype) == ((3, 5), jnp.bfloat16)
    assert compat.varies(result) == {"i"}


def mesh_of(platform):
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    return AbstractMesh((1,), ("x",), abstract_device=device)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_mesh_platform_is_that_of_a_mesh_of_absent_devices(platform):
    assert compat.mesh_platform() is None
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        assert compat.mesh_platform() == platform


def test_mesh_platform_is_that_of_a_mesh_of_present_devices():
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))):
        assert compat.mesh_platform() == "cpu"


def test_without_a_mesh_values_are_concrete():
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")), compat.no_mesh():
        assert compat.mesh_platform() is None
        assert np.array_equal(jnp.arange(3) + 1, [1, 2, 3])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_without_axes_the_device_stays(platform):
    with jax.sharding.use_abstract_mesh(mesh_of(platform)), compat.no_axes():
        assert compat.mesh_platform() == platform
        assert jax.sharding.get_abstract_mesh().axis_names == ()


def test_sharded_over_is_what_the_type_says():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    array = jax.device_put(jnp.zeros((4, 3)), jax.sharding.NamedSharding(mesh, P("x")))
    assert [compat.sharded_over(jax.typeof(array), axis) for axis in (0, 1)] == ["x", None]


def test_trace_settings_are_those_of_the_caller():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        settings = compat.trace_settings()
    with settings():
        assert jnp.zeros(1).dtype == jnp.float64
        product = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert "HIGHEST" in str(product)
    assert jnp.zeros(1).dtype == jnp.float32


def private(path):
    """What a file imports of JAX that is not documented."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (n for n in names if n.startswith(("jax._", "jax.extend", "jax.interpreters")))


def test_only_compat_imports_what_jax_does_not_document():
    for top in ("attention_jax", "experiments"):
        for path in (ROOT / top).rglob("*.py"):
            if path != pathlib.Path(compat.__file__):
                assert not list(private(path)), path
