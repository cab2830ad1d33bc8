import pytest
from torch import Tensor

from ssd_torchrec.encoders.encoder import Encoder, StreamingEncoder
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.jagged import JaggedLayout


class Echo(Encoder):
    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        return events


class Forgetful(StreamingEncoder[tuple[Tensor]]):
    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        return events


def test_an_encoder_is_whatever_has_a_forward():
    Echo()
    with pytest.raises(TypeError, match=r"abstract method '?forward"):
        Encoder()


def test_an_encoder_that_streams_must_say_how():
    with pytest.raises(TypeError, match=r"abstract methods '?append'?, '?initial_state"):
        Forgetful()


def test_tim4rec_streams_and_is_causal():
    net = TiM4Rec(TiM4RecConfig(width=32))
    assert isinstance(net, StreamingEncoder)
    assert (net.width, net.causal) == (32, True)
