"""Attention over several devices, and over sequences longer than a device.

There are four ways to split a call:

==============  ===========================  ====================================================
split           what each device gathers     take it
==============  ===========================  ====================================================
batch           nothing                      first: as long as there are examples for all devices
heads           nothing                      with weights that are split over heads (tensor
                                             parallel); the key-value heads limit the devices
sequence,       the keys and values of all   long sequences whose keys and values fit on a device
``attention``
sequence,       depends on the strategy,     longer ones, another order of the sequence, or
``parallel``    see below                    inside ``shard_map``
==============  ===========================  ====================================================

They combine: one mesh axis for each. Under explicit axes, the default of ``jax.make_mesh``, plain
``attention`` follows the sharding of its arrays, and ``explain`` says how:

>>> import functools
>>> import jax
>>> import jax.numpy as jnp
>>> import numpy as np
>>> import attention_jax as aj
>>> from attention_jax import masks, parallel
>>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
>>> n = jax.device_count()
>>> q, k, v = (jax.random.normal(jax.random.key(i), (n, 32 * n, n, 8)) for i in range(3))
>>> whole = aj.attention(q, k, v, mask=masks.causal())
>>> mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Explicit,))
>>> def split(*spec):
...     shards = [jax.device_put(x, NamedSharding(mesh, P(*spec))) for x in (q, k, v)]
...     out = aj.attention(*shards, mask=masks.causal())
...     assert np.allclose(jax.device_get(out), whole, atol=1e-5)
...     print(jax.typeof(out).sharding.spec, "--", aj.explain(*shards).split)
>>> split("x")  # batch
P('x', None, None, None) -- B over x
>>> split(None, None, "x")  # heads
P(None, None, 'x', None) -- N and K over x
>>> split(None, "x")  # sequence
P(None, 'x', None, None) -- T over x; gathers S of key and value

Under Auto axes the compiler does the same for batch and heads; it gathers a sequence.

``parallel.attention`` is called inside ``jax.shard_map``, by every device with its own queries,
keys and values. It takes what ``attention`` takes, and computes attention over the whole sequence;
each device returns the rows of its own queries. There are three strategies:

==========  ==============================  ==========================  ==========================
strategy    what is sent                    memory per device           take it
==========  ==============================  ==========================  ==========================
``gather``  keys and values of all          all keys and values, its    by default: one exchange,
            devices, once                   own queries                 any implementation
``ring``    keys and values, from device    its own queries, keys and   when the keys and values of
            to device, during the           values, and those on the    all devices do not fit, or
            computation                     way                         to hide the exchange
``heads``   query, key, value and output,   the whole sequence, its     when every device can have
            once (all-to-all)               share of the heads          heads of its own: it sends
                                                                        the least
==========  ==============================  ==========================  ==========================

With few key-value heads ``gather`` sends little. ``heads`` needs numbers of query heads and of
key-value heads that the devices divide. ``ring`` supports only first-order reverse mode; ``gather``
and ``heads`` support what ``attention`` does.

>>> auto = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,))
>>> for strategy in ("gather", "ring", "heads"):
...     local = functools.partial(
...         parallel.attention, axis_name="x", strategy=strategy, mask=masks.causal()
...     )
...     attend = jax.shard_map(local, mesh=auto, in_specs=P(None, "x"), out_specs=P(None, "x"))
...     print(strategy, np.allclose(jax.jit(attend)(q, k, v), whole, atol=1e-5))
gather True
ring True
heads True

Under a causal mask the first devices have little to compute, if every device has one part of the
sequence, and the others wait for the last. ``zigzag`` gives each the same work. Positions then say
where a device's queries and keys are, and masks, scores and dropout follow them:

>>> order = parallel.zigzag(32 * n, n)
>>> @jax.jit
... @functools.partial(
...     jax.shard_map, mesh=auto, in_specs=(P("x"), *(P(None, "x"),) * 3), out_specs=P(None, "x")
... )
... def attend(positions, q, k, v):
...     return parallel.attention(
...         q, k, v, axis_name="x", strategy="ring", mask=masks.causal(),
...         query_positions=positions, key_positions=positions,
...     )
>>> out = attend(order.permutation, *(x[:, order.permutation] for x in (q, k, v)))
>>> np.allclose(out[:, order.inverse], whole, atol=1e-5)
True

In a model, permute tokens and their positions once, before the embeddings, and undo it after the
loss or not at all: every other layer works token by token.

The devices must divide the length: pad the sequence, and mask the keys that are not real.

>>> T, real = 32 * n, 32 * n - 3
>>> q, k, v = (jnp.pad(x[:, :real], ((0, 0), (0, 3), (0, 0), (0, 0))) for x in (q, k, v))
>>> mask = masks.causal() & masks.lengths(key=jnp.full(n, real))
>>> @jax.jit
... @functools.partial(jax.shard_map, mesh=auto, in_specs=P(None, "x"), out_specs=P(None, "x"))
... def attend(q, k, v):
...     return parallel.attention(q, k, v, axis_name="x", strategy="ring", mask=mask)
>>> np.allclose(attend(q, k, v)[:, :real], whole[:, :real], atol=1e-5)
True

Arrays of masks and scores belong to a device as its queries and keys do: ``masks.segments`` takes
the ids of its queries and of its keys, ``scores.bias`` a row for each of its queries and a column
for every key of the sequence, in the order of the devices.
"""

from attention_jax.parallel.call import attention as attention
from attention_jax.parallel.orders import Order as Order
from attention_jax.parallel.orders import striped as striped
from attention_jax.parallel.orders import zigzag as zigzag

__all__ = ["Order", "attention", "striped", "zigzag"]
