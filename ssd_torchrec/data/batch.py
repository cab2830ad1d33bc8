"""What one step consumes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ssd_torchrec.jagged import JaggedLayout


@dataclass(frozen=True, eq=False)
class Batch(Pipelineable):
    """B rows of history, the candidates to tell their next items from, and which candidate is right.

    #             row 0            row 1   row 2
    # item        [7, 3, 3]        []      [9, 4]       an empty row fills a rank that got none
    # timestamp   [100, 160, 900]  []      [120, 121]   int64 seconds; no table owns this key
    # candidate   [3, 4, 9, 12]    []      []           all in row 0, as the keys of a KJT share B
    # segment     [5]              []      [1]          a context key: one bag a row
    # target      [0, 0, 2]        []      [1, -1]      position in the candidate list; -1 asks for nothing
    """

    features: KeyedJaggedTensor
    layout: JaggedLayout  # of item and timestamp
    target: Tensor  # (T,) int64
    global_targets: int  # targets of the global batch, over all ranks; at least 1

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            layout=self.layout.to(device, non_blocking=non_blocking),
            target=self.target.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        return replace(
            self,
            features=self.features.pin_memory(),
            layout=self.layout.pin_memory(),
            target=self.target.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        # torchrec asks for a CUDA stream and passes any on
        self.features.record_stream(stream)  # pyright: ignore[reportArgumentType]
        self.layout.record_stream(stream)
        self.target.record_stream(stream)
