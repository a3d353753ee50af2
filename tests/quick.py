"""Options with which XLA compiles fast and the programs run slowly: for a single run."""

import jax
from flax import nnx


def known(options):
    """Those that this jaxlib has; they come and go."""

    def works(name, value):
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if works(name, value)}


QUICK = known({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})


def quickly(fn):
    """``fn`` of a module and arrays, as one program that is compiled fast."""
    programs = {}

    def run(module, *args):
        graph, state = nnx.split(module)
        if graph not in programs:
            programs[graph] = jax.jit(
                lambda state, *args: fn(nnx.merge(graph, state), *args), compiler_options=QUICK
            )
        return programs[graph](state, *args)

    return run
