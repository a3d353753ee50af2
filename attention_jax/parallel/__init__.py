"""Sequences longer than a device: attention over a mesh axis that splits the sequence.

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
key-value heads that the devices divide. ``ring`` is differentiated once, in reverse mode, by a ring
of its own; the others as ``attention`` is.

Under a causal mask the first devices have little to compute, if every device has one part of the
sequence, and the others wait for the last. ``zigzag`` gives each the same work. Positions then say
where a device's queries and keys are, and masks, scores and dropout follow them:

>>> import functools
>>> import jax
>>> import jax.numpy as jnp
>>> import attention_jax as aj
>>> from attention_jax import masks, parallel
>>> from jax.sharding import AxisType, PartitionSpec as P
>>> n = jax.device_count()
>>> mesh = jax.make_mesh((n,), ("seq",), axis_types=(AxisType.Auto,))
>>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 32 * n, 2, 8)) for i in range(3))
>>> order = parallel.zigzag(32 * n, n)
>>> @jax.jit
... @functools.partial(
...     jax.shard_map, mesh=mesh, in_specs=(P("seq"), *(P(None, "seq"),) * 3),
...     out_specs=P(None, "seq"),
... )
... def attend(positions, q, k, v):
...     return parallel.attention(
...         q, k, v, axis_name="seq", strategy="ring", mask=masks.causal(),
...         query_positions=positions, key_positions=positions,
...     )
>>> out = attend(order.permutation, *(x[:, order.permutation] for x in (q, k, v)))
>>> whole = aj.attention(q, k, v, mask=masks.causal())
>>> bool(jnp.allclose(out[:, order.inverse], whole, atol=1e-5))
True

In a model, permute tokens and their positions once, before the embeddings, and undo it after the
loss or not at all: every other layer works token by token.

Arrays of masks and scores belong to a device as its queries and keys do: ``masks.segments`` takes
the ids of its queries and of its keys, ``scores.bias`` a row for each of its queries and a column
for every key of the sequence, in the order of the devices.

Plain ``attention`` does the same as ``gather`` by itself where its arrays are sharded along the
sequence over an Explicit mesh axis (the default of ``jax.make_mesh``), outside of ``shard_map``.
With batch or heads sharded, too, use one mesh axis for each: they need no exchange.
"""

from attention_jax.parallel.call import attention as attention
from attention_jax.parallel.orders import Order as Order
from attention_jax.parallel.orders import striped as striped
from attention_jax.parallel.orders import zigzag as zigzag

__all__ = ["Order", "attention", "striped", "zigzag"]
