"""Options with which XLA compiles fast and the programs run slowly: for a single run."""

import jax


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
