"""Our operators as the contenders that they are, each through its door."""

from torch import Tensor

from benchmarks.ops_on_gpu import peers
from benchmarks.ops_on_gpu.contenders import Batch, Call, Tensors, leaves, of_way
from ssd_torchrec.ops.gated_norm import gated_norm
from ssd_torchrec.ops.item_softmax import item_softmax
from ssd_torchrec.ops.selective_scan import selective_scan
from ssd_torchrec.ops.short_conv import short_conv
from ssd_torchrec.ops.ssd_bidirectional import ssd_scan_bidirectional
from ssd_torchrec.ops.ssd_scan import ssd_scan

TWO_SCANS = "ours, two scans"
BIDIRECTIONAL_ALONE = (TWO_SCANS,)


def scan(tensors: Tensors, batch: Batch) -> Call:
    """Both directions at once where both are asked for."""
    t = leaves(tensors)
    given = (t["x"], t["dt"], t["A"], t["B"], t["C"], batch.layout)
    door = ssd_scan_bidirectional if batch.both else ssd_scan
    return Call(t, lambda: door(*given, dt_bias=t["dt_bias"], D=t["D"]))


def two_scans(tensors: Tensors, batch: Batch) -> Call:
    t = leaves(tensors)

    def one_way(way: int, D: Tensor | None) -> Tensor:
        dt, A, bias = of_way(t, batch, way)
        return ssd_scan(t["x"], dt, A, t["B"], t["C"], batch.layout, dt_bias=bias, D=D, reverse=way == 1)

    return Call(t, lambda: one_way(0, t["D"]) + one_way(1, None))


def selective(tensors: Tensors, batch: Batch) -> Call:
    t = leaves(tensors)
    given = (t["x"], t["dt"], t["A"], t["B"], t["C"], batch.layout)
    return Call(t, lambda: selective_scan(*given, dt_bias=t["dt_bias"], D=t["D"]))


def conv(tensors: Tensors, batch: Batch) -> Call:
    t = leaves(tensors)
    given = (t["x"], t["weight"], t["bias"], batch.layout)
    return Call(t, lambda: short_conv(*given, activation="silu", reverse=batch.both))


def norm(tensors: Tensors, batch: Batch) -> Call:
    t = leaves(tensors)
    return Call(t, lambda: gated_norm(t["y"], t["z"], t["weight"], eps=1e-5))


softmax = peers.softmax(lambda queries, candidates, target: item_softmax(queries, candidates, target))
