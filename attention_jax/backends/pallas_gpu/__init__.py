"""Our GPU kernels. Read ``run``, then ``kernels`` (the formulas), ``launch`` and ``refs``."""
