"""Our GPU kernels: ``run`` first, then ``kernels`` (the formulas), ``launch`` and ``refs``."""
