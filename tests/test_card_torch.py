"""What ``card`` times in torch computes what ours does."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.card import contenders, speed
from experiments.card.calls import calls

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("name", contenders.of_torch())
@pytest.mark.parametrize("call", list(calls(True)), ids=str)
def test_computes_the_same(call, name):
    try:
        attend = contenders.of_torch()[name](call, True)
    except NotImplementedError:
        assert name == "torch, SDPA"
        assert call.kind not in ("dense", "causal", "gqa", "decode")
        return
    q, k, v, *_ = contenders.torch_arrays(call)
    theirs = attend(q, k, v).transpose(1, 2).float().numpy()
    arrays = [jnp.asarray(x.float().numpy()).swapaxes(1, 2).astype(jnp.bfloat16) for x in (q, k, v)]
    ids = call.documents
    ours = contenders._ours("xla", call)(*arrays, *([] if ids is None else [jnp.asarray(ids)]))
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.04, rtol=0.04)


def test_records():
    call = next(calls(True))
    found = list(speed.of_call_in_torch(call, True, 1.0))
    assert [row["implementation"] for row in found] == ["torch, SDPA"] * 2 + ["torch, flex"] * 2
    sdpa, both, flex, refused = found
    assert all(row["ms"] > 0 for row in (sdpa, both, flex))
    assert (sdpa["direction"], both["direction"]) == ("forward", "forward + backward")
    assert "refused" in refused  # torch has no flex backward pass on a CPU
